"""From a map as coarse as a method's features to boundaries as fine as pixels."""

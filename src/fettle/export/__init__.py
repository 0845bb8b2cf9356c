"""Export with proven parity: one graph from the framed picture to the verdict, and how far it is off."""

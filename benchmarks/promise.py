"""Are the measured false-reject rates consistent with the promises? Beta-binomial tests over all sets.

    python benchmarks/promise.py [--pictures 100] [--test 100] [--method patchcore]

Renders every procedural product, fits, and counts the event that the promise is on, among fresh good parts.
Records of `accuracy.py` (real sets; square frames, seed 0) are tested beside them where they exist. The
screw's original split is left out: its good test pictures were taken under other light, so that no promise
can hold. With S sets the alarm is p < 0.05 / S (Bonferroni).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fettle.datasets.parts import PRODUCTS, write_parts
from fettle.detector import Detector

RECORDS = Path(__file__).parent / "records" / "accuracy"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--method", default="patchcore")
    arguments = parser.parse_args()
    results = []
    for path in sorted(RECORDS.glob(f"*-{arguments.method}-square-0.json")):
        record = json.loads(path.read_text())
        if record["data"] != "screw_original":
            results.append((f"{record['data']}, {record['backbone']}", record))
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), train=arguments.pictures, test_good=arguments.test, defects=1)
        for product in PRODUCTS:
            detector = Detector.fit(Path(folder) / product, method=arguments.method)
            found = detector.evaluate(Path(folder) / product)
            results.append((product, {**found, "num_calibration": detector.calibration.num_scores}))
    print("| set | calibrated on | promise | fresh good | measured | 95 % interval | p |")
    print("|---|---|---|---|---|---|---|")
    for name, result in results:
        low, high = result["frr_interval"]
        promise = f"{result['frr_promised']:.3g} on {result['promise_on']}"
        measured = f"{result['frr_measured']:.3f} | {low:.3f} to {high:.3f} | {result['frr_p_value']:.3f}"
        print(f"| {name} | {result['num_calibration']} | {promise} | {result['num_good']} | {measured} |")
    least = min(result["frr_p_value"] for _, result in results)
    print(f"\nLeast p {least:.4f} of {len(results)} sets; alarm below {0.05 / len(results):.4f}.")


if __name__ == "__main__":
    main()

"""`steerscale scaling`: `reconcile` is here, `plan`, `fit` and `ladder` in modules of their own."""

import argparse
import json
from typing import Any

from steerscale.cli import scaling_fit, scaling_ladder, scaling_plan


def add_parser(subparsers: Any) -> None:
    """Register `steerscale scaling`."""
    parser = subparsers.add_parser("scaling", help="scaling laws: a budget's best model, fits to trained models")
    commands = parser.add_subparsers(dest="scaling_command", metavar="COMMAND", required=True)
    scaling_plan.add_parser(commands)
    scaling_ladder.add_parser(commands)
    scaling_fit.add_parser(commands)
    reconcile = commands.add_parser(
        "reconcile",
        help="why Kaplan's exponent is not Chinchilla's",
        description="The exponent a of N ~ C^a that Kaplan's study would find if Chinchilla's law held, with and without "
        "embeddings (Pearce & Song 2024).",
    )
    reconcile.add_argument("--json", action="store_true", help="print one JSON object")
    reconcile.set_defaults(run=_reconcile)


def _reconcile(args: argparse.Namespace) -> None:
    from steerscale.planning.scaling_laws import (
        CHINCHILLA_3,
        KAPLAN,
        PORIAN_EXPONENTS,
        REFIT,
        simulated_exponent,
    )

    rows = [
        {
            "law": title,
            "non_embedding": simulated_exponent(law, embeddings=False),
            "total": simulated_exponent(law, embeddings=True),
            "exact": law.exponent,
        }
        for title, law in (("refit", REFIT), ("Chinchilla 3", CHINCHILLA_3))
    ]
    if args.json:
        print(json.dumps({"kaplan": KAPLAN.exponent, "simulated": rows, "porian": dict(PORIAN_EXPONENTS)}, indent=1))
        return
    print(f"Kaplan et al. 2020 measured N ~ C^{KAPLAN.exponent:.2f} without embeddings. Their study, simulated:")
    print(f"{'if this law holds':<20}{'without':>10}{'with':>10}{'exact':>10}")
    for row in rows:
        print(f"{row['law']:<20}{row['non_embedding']:>10.3f}{row['total']:>10.3f}{row['exact']:>10.3f}")
    print("\nPorian et al. 2024, measured on RefinedWeb, one cause after the other removed:")
    for what, exponent in PORIAN_EXPONENTS:
        print(f"  {exponent:.3f}  {what}")

"""The command `lars VERB`; also `python -m lars VERB`."""

from __future__ import annotations

import gc
import sys
from importlib import import_module

from lars.run.progress import outlive_output

VERBS = {
    "new": ("lars.commands.new", "a recipe for a folder of your own images"),
    "plan": ("lars.commands.plan", "how long a recipe takes on a cluster, and how much memory"),
    "keys": ("lars.commands.keys", "every key of a recipe, with its neutral value, limit and unit"),
    "show": ("lars.commands.show", "a picture of the images as a recipe trains on them"),
    "doctor": ("lars.commands.doctor", "are these machines ready? On all nodes, started like a run"),
    "convert": ("lars.commands.convert", "a local Parquet copy of a data set, an image folder or ILSVRC's tar files"),
    "reproduce": ("lars.commands.reproduce", "check, train or resume a recipe, and judge what it reached"),
    "prove": ("lars.commands.prove", "one recipe at 1, 2 and 4 processes, and killed and resumed: one hash"),
    "verify": ("lars.commands.verify", "train somebody's run again and say whether it is the same run"),
    "evaluate": ("lars.commands.evaluate", "top-1 of a run or a model of timm, in all and class by class"),
    "predict": ("lars.commands.predict", "what a trained model sees in pictures"),
    "export": ("lars.commands.export", "a run's weights as a folder that plain timm loads"),
    "report": ("lars.report.report", "compare runs, with curves and one HTML page"),
    "ledger": ("lars.commands.ledger", "put finished runs into the results of their recipe"),
    "tables": ("lars.commands.tables", "write the READMEs' tables from recipes, plan and committed results"),
    "mllog": ("lars.run.mllog", "let MLPerf's own package judge a run's log"),
}


def main() -> int:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("usage: lars VERB ...        `lars VERB --help` has examples\n")
        for name, (_, what) in VERBS.items():
            print(f"  {name:<11}{what}")
        return 0
    if verb not in VERBS:
        print(f"error: lars has no verb {verb!r}: one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    outlive_output()
    sys.argv = [f"lars {verb}", *sys.argv[2:]]
    gc.disable()  # imports leave no garbage, and to look for it among their objects takes long
    command = import_module(VERBS[verb][0])
    gc.freeze()
    gc.enable()
    return command.main()


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `ecul COMMAND --help`. Each command is a thin caller of the Python functions."""

import argparse
import json
import logging
import sys
from pathlib import Path

from .config import DATASETS, METHODS, Config


def main(argv=None):
    """Run one command; returns the exit code. Errors meant for people are one line, without a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, TypeError, OSError, RuntimeError) as e:
        if args.traceback:
            raise
        print(f"ecul {args.command}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ecul {args.command}: interrupted", file=sys.stderr)
        return 130


def train(args):
    """Train without identity labels; the run directory holds model, log and configuration."""
    from .training import train

    config = Config.preset(args.preset or args.dataset, method=args.method, **dict(args.set))
    run = train(_open(args), config, output=args.output, resume=args.resume, device=args.device)
    print(f"finished {len(run.history)} epochs; the model is {Path(run.output) / 'model.safetensors'}")


def evaluate(args):
    """Evaluate a trained model with the data set's published protocol."""
    from .evaluation import evaluate
    from .model import TwoStreamResNet

    model = TwoStreamResNet.from_pretrained(args.model).to(_device(args))
    results = evaluate(model, _open(args))
    print(json.dumps(results.to_dict(), indent=2) if args.json else results.table())


def check(args):
    """Compare a data set's folder with what was published; exit code 1 when something is wrong."""
    report = _open(args).check(decode=not args.quick)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.ok else 1


def synthesize(args):
    """Render the synthetic world as JPEG files in SYSU-MM01's layout."""
    from .synthetic import synthesize

    print(
        synthesize(args.root, identities=args.identities, images=args.images, size=args.size, seed=args.seed)
    )


def demo(args):
    """Render the synthetic world, check it, train without labels, evaluate: the whole way in minutes."""
    from .data import open_dataset
    from .evaluation import evaluate
    from .synthetic import synthesize
    from .training import build_model, train

    output = Path(args.output)
    root = synthesize(output / "world", seed=args.seed)
    dataset = open_dataset("sysu", root)
    print(dataset.check(decode=True))
    config = Config.preset("demo", method=args.method, seed=args.seed)
    before = evaluate(build_model(config, _device(args)), dataset)
    run = train(dataset, config, output=output / args.method, resume=True, device=args.device)
    print(f"\nsynthetic world, held-out identities, before training\n{before.table()}")
    print(
        f"\nafter {len(run.history)} epochs without labels ({args.method})\n{evaluate(run.model, dataset).table()}"
    )
    print(f"\nthe run directory is {run.output}")


def _open(args):
    from .data import open_dataset

    return open_dataset(args.dataset, args.root, **dict(args.option))


def _device(args):
    import torch

    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _parser():
    parser = argparse.ArgumentParser(prog="ecul", description=__doc__.split("\n")[0])
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, *, dataset=True, device=True):
        p = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        p.set_defaults(run=function)
        if dataset:
            p.add_argument("dataset", help="sysu, regdb, llcm or market")
            p.add_argument("root", help="the folder of the data set, as downloaded")
            p.add_argument(
                "--option", type=_pair, action="append", default=[], metavar="NAME=VALUE",
                help="an option of open_dataset, for instance trial=1, subset=true or pack=false",
            )  # fmt: skip
        if device:
            p.add_argument("--device", help="cpu, cuda, cuda:1 ...; by default the GPU when there is one")
        return p

    p = command(train)
    p.add_argument("-o", "--output", required=True, help="the run directory")
    p.add_argument("--method", default="united", help=f"one of {', '.join(METHODS)} (default: united)")
    p.add_argument("--preset", help=f"one of {', '.join(DATASETS)} (default: the data set's name)")
    p.add_argument("--resume", action="store_true", help="go on with the run that is in the directory")
    p.add_argument(
        "--set", type=_pair, action="append", default=[], metavar="FIELD=VALUE",
        help="a field of Config, for instance iterations=100 or size=[256,128]",
    )  # fmt: skip

    p = command(evaluate)
    p.add_argument("--model", required=True, help="a run directory or a model.safetensors")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")

    p = command(check, device=False)
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.add_argument("--quick", action="store_true", help="count files without decoding every image")

    p = command(synthesize, dataset=False, device=False)
    p.add_argument("root", help="the folder to write")
    p.add_argument(
        "--identities", type=int, default=96, help="training identities; half as many more for tests"
    )
    p.add_argument("--images", type=int, default=4, help="images of each identity and camera")
    p.add_argument("--size", type=int, nargs=2, default=(64, 32), metavar=("H", "W"), help="pixels")
    p.add_argument("--seed", type=int, default=0)

    p = command(demo, dataset=False)
    p.add_argument("-o", "--output", default="runs/demo", help="where the world and the run go")
    p.add_argument("--method", default="united", help=f"one of {', '.join(METHODS)} (default: united)")
    p.add_argument("--seed", type=int, default=0)
    return parser


def _pair(text):
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.replace("-", "_"), {"None": None, "True": True, "False": False}.get(value, value)


if __name__ == "__main__":
    sys.exit(main())

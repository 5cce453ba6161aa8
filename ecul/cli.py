"""The command line: `ecul COMMAND --help`. Each command is a thin caller of the Python functions."""

import argparse
import io
import json
import os
import sys
from pathlib import Path

from ecul import MODALITIES, __version__
from ecul.common.logs import logging_to_stderr
from ecul.common.names import shorten
from ecul.config import DATASETS, METHODS, Config

MODEL = "a run directory, a directory of save_pretrained, or a model.safetensors"
OPTION = "an option of open_dataset, for instance trial=1, subset=true or cameras=true; may be repeated"
NAMES = "sysu, regdb, llcm, market, or folders (of one's own: root/visible and root/infrared)"


def main(argv=None):
    """Run one command; returns the exit code. Errors meant for people are one line, without a traceback."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8
    try:
        with logging_to_stderr():
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as e:
        if args.traceback:
            raise
        print(f"ecul {args.command}: {e or type(e).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; --resume goes on after the last finished epoch" if args.command == "train" else ""
        print(f"ecul {args.command}: interrupted{hint}", file=sys.stderr)
        return 130


def train(args):
    """Train without identity labels; the run directory holds model, log and configuration."""
    from ecul.common import distributed
    from ecul.training import train

    dataset = _open(args)
    preset = args.preset or dataset.protocol or "sysu"
    config = Config.preset(preset, **{"method": args.method, **dict(args.set)})
    run = train(dataset, config, output=args.output, resume=args.resume, device=args.device)
    if distributed.rank() == 0:
        print(f"finished {len(run.history)} epochs; the model is {Path(run.output) / 'model.safetensors'}")
    distributed.stop()


def evaluate(args):
    """Evaluate a trained model with the data set's published protocol; several models are averaged."""
    from ecul.evaluation.protocols import average, evaluate

    trials = [{"trial": t} for t in args.trials_of] or [{}] * len(args.model)
    if len(trials) != len(args.model):
        raise ValueError(f"--trials-of names {len(trials)} trials for {len(args.model)} models: one for each")
    options = {"modes": args.modes, "shots": args.shots, "draw": args.draw, "rerank": args.rerank}
    found = []
    for path, trial in zip(args.model, trials, strict=True):
        model = _model(path, args)
        dataset = _dataset(args.dataset, args.root, {**dict(args.option), **trial})
        found.append(evaluate(model, dataset, **options))
    results = average(found) if len(found) > 1 else found[0]
    print(json.dumps(results.to_dict(), indent=2) if args.json else results.table())


def extract(args):
    """Write the features of a folder's images as safetensors, with their names and the model's hash."""
    from ecul.common.files import prepare_output
    from ecul.search import extract_folder, save_features

    prepare_output(args.output, ".safetensors")
    options = {"skip_unreadable": args.skip_unreadable, "batch_size": args.batch_size}
    found = extract_folder(_model(args.model, args), args.folder, args.modality, **options)
    save_features(args.output, found, args.model)
    _list_unreadable(found)
    rows, size = found.features.shape
    print(f"{rows} features of size {size} are in {args.output}")


def search(args):
    """Rank a gallery's images for each query; print the answers, and draw them if asked to."""
    from ecul.report.pictures import draw_ranking, prepare_picture
    from ecul.search import search

    if args.output:
        prepare_picture(args.output)
    options = {"skip_unreadable": args.skip_unreadable, "batch_size": args.batch_size}
    modalities = (args.query_modality, args.gallery_modality)
    model = _model(args.model, args)
    ranking = search(model, args.query, args.gallery, *modalities, top=args.top, **options)
    _list_unreadable(ranking.query, ranking.gallery)
    try:
        if args.output:
            drawn = draw_ranking(args.output, ranking, model.input_size)
            print(f"{args.output}: {drawn} of {len(ranking.rows)} queries are drawn", file=sys.stderr)
    finally:
        print(json.dumps(ranking.to_dict(), indent=2) if args.json else ranking.table())


def report(args):
    """Draw a run: curves, ranked lists, clusters and matches as PNGs and as one HTML page that has all."""
    from ecul.report.build import report

    options = {"root": args.root, "options": args.option, "queries": args.queries, "top": args.top}
    print(report(args.run_directory, **options, device=_device(args)))


def import_(args):
    """Bring in a published checkpoint (AGW, ADCA, PGM, MBCCM layouts) as a model of this library."""
    from ecul.importers import import_checkpoint

    if (Path(args.output) / "resume.json").exists():
        raise ValueError(f"output: {args.output} holds a run of train; choose another directory")
    model, unused = import_checkpoint(args.file, args.size)
    for reason, names in unused.items():
        print(f"left out, {reason}: {shorten(names, 1)}")
    model.save_pretrained(args.output, {"imported_from": Path(args.file).name})
    print(f"a ResNet-{model.settings['depth']} is in {args.output}")


def export(args):
    """Write one modality of a model as ONNX (.onnx) or as a torch.export program (.pt2)."""
    from ecul.export import export

    export(_model(args.model, args), args.output, args.modality, flip=not args.no_flip)
    print(f"pixels (N, 3, H, W) from 0 to 255 in, unit features out: {args.output}")


def check(args):
    """Compare a data set's folder with what was published; exit code 1 when something is wrong."""
    report = _open(args).check(decode=not args.quick)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.ok else 1


def synthesize(args):
    """Render the synthetic world as JPEG files in SYSU-MM01's layout."""
    from ecul.synthetic.world import synthesize

    print(
        synthesize(args.root, identities=args.identities, images=args.images, size=args.size, seed=args.seed)
    )


def demo(args):
    """Render the synthetic world, check it, train without labels, evaluate: the whole way in minutes."""
    from ecul.data.dataset import open_dataset
    from ecul.evaluation.protocols import evaluate
    from ecul.optim import build_model
    from ecul.synthetic.world import synthesize
    from ecul.training import train

    output, device = Path(args.output), _device(args)
    root = synthesize(output / f"world-{args.seed}", seed=args.seed)
    dataset = open_dataset("sysu", root)
    print(dataset.check(decode=True))
    config = Config.preset("demo", method=args.method, seed=args.seed)
    before = evaluate(build_model(config, device), dataset)
    run = train(dataset, config, output=output / f"{args.method}-{args.seed}", resume=True, device=device)
    after = evaluate(run.model, dataset)
    print(f"\nsynthetic world, held-out identities, before training\n{before.table()}")
    print(f"\nafter {len(run.history)} epochs without labels ({args.method})\n{after.table()}")
    print(f"\nthe run directory is {run.output}")


def _open(args):
    return _dataset(args.dataset, args.root, args.option)


def _dataset(name, root, options):
    from ecul.data.dataset import open_dataset

    return open_dataset(name, root, **dict(options))


def _model(path, args):
    from ecul.model import TwoStreamResNet

    return TwoStreamResNet.from_pretrained(path).to(_device(args))


def _list_unreadable(*folders):
    for path in [path for folder in folders for path in folder.unreadable]:
        print(f"skipped, cannot be read: {path}", file=sys.stderr)


def _device(args):
    from ecul.common.distributed import choose_device

    return choose_device(args.device)


def _parser():
    parser = argparse.ArgumentParser(prog="ecul", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function):
        name = function.__name__.rstrip("_")
        p = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        p.set_defaults(run=function)
        return p

    _add_training(command)
    _add_own_images(command)
    _add_checkpoints(command)
    _add_worlds(command)
    return parser


def _add_training(command):
    p = _with_device(_with_dataset(command(train)))
    p.add_argument("-o", "--output", required=True, help="the run directory")
    p.add_argument("--method", default="united", choices=METHODS, help="the method (default: united)")
    p.add_argument(
        "--preset", choices=DATASETS, help="whose settings (default: those of the data set, else sysu's)"
    )
    p.add_argument("--resume", action="store_true", help="go on with the run that is in the directory")
    p.add_argument(
        "--set", type=_pair, action="append", default=[], metavar="FIELD=VALUE",
        help="a field of Config, for instance iterations=100 or size=[256,128]; may be repeated",
    )  # fmt: skip

    p = _with_device(_with_dataset(command(evaluate)))
    p.add_argument("--model", required=True, nargs="+", help=f"{MODEL}; several are averaged")
    p.add_argument(
        "--trials-of",
        type=int,
        nargs="+",
        default=[],
        help="RegDB: the trial of each model, for instance 1 2 3",
    )
    p.add_argument(
        "--modes", nargs="+", help="rows of the protocol, for instance all indoor (default: all rows)"
    )
    p.add_argument(
        "--shots", type=int, nargs="+", help="SYSU-MM01: gallery images an identity and camera: 1, 10"
    )
    p.add_argument("--draw", default="random", help="random, or the path of SYSU-MM01's rand_perm_cam.mat")
    p.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking, named in the output")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")

    p = _with_device(command(report))
    p.add_argument("run_directory", metavar="RUN", help="the directory that train wrote")
    p.add_argument("--root", help="the folder of the data set (default: where it was in training)")
    p.add_argument("--option", type=_pair, action="append", default=[], metavar="NAME=VALUE", help=OPTION)
    p.add_argument("--queries", type=int, default=6, help="ranked lists to draw (default: 6)")
    p.add_argument("--top", type=int, default=10, help="answers in each (default: 10)")


def _add_own_images(command):
    p = _with_reading(_with_device(command(extract)))
    p.add_argument("model", help=MODEL)
    p.add_argument("folder", help="a folder of images, read with all its sub-folders, or one image")
    p.add_argument("--modality", required=True, choices=MODALITIES, help="of these images")
    p.add_argument("-o", "--output", required=True, help="the .safetensors file to write")

    p = _with_reading(_with_device(command(search)))
    p.add_argument("model", help=MODEL)
    p.add_argument("--query", required=True, help="an image, or a folder of images")
    p.add_argument("--gallery", required=True, help="the folder of images to search")
    p.add_argument("--query-modality", required=True, choices=MODALITIES, help="of the queries")
    p.add_argument("--gallery-modality", required=True, choices=MODALITIES, help="of the gallery")
    p.add_argument("--top", type=int, default=10, help="answers to each query (default: 10)")
    p.add_argument("-o", "--output", help="a .png to draw the first 24 queries and 20 answers in")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_checkpoints(command):
    p = command(import_)
    p.add_argument("file", help="a .pth, .tar or .safetensors file; code in it is never run")
    p.add_argument("-o", "--output", required=True, help="the directory to write the model into")
    p.add_argument(
        "--size", type=int, nargs=2, default=(288, 144), metavar=("H", "W"),
        help="pixels of the images that it was trained with, which no file says (default: 288 144)",
    )  # fmt: skip

    p = _with_device(command(export))
    p.add_argument("model", help=MODEL)
    p.add_argument("-o", "--output", required=True, help="the .onnx or .pt2 file to write")
    p.add_argument("--modality", required=True, choices=MODALITIES, help="of the images it will see")
    p.add_argument("--no-flip", action="store_true", help="without the mirror image: half the work")


def _add_worlds(command):
    p = _with_dataset(command(check))
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.add_argument("--quick", action="store_true", help="count files without decoding every image")

    p = command(synthesize)
    p.add_argument("root", help="the folder to write")
    p.add_argument(
        "--identities", type=int, default=96,
        help="training identities; half as many more for tests (default: 96)",
    )  # fmt: skip
    p.add_argument("--images", type=int, default=4, help="images of each identity and camera (default: 4)")
    p.add_argument(
        "--size", type=int, nargs=2, default=(64, 32), metavar=("H", "W"), help="pixels (default: 64 32)"
    )
    p.add_argument("--seed", type=int, default=0, help="the same seed, the same images (default: 0)")

    p = _with_device(command(demo))
    p.add_argument("-o", "--output", default="runs/demo", help="where the world and the run go")
    p.add_argument("--method", default="united", choices=METHODS, help="the method (default: united)")
    p.add_argument("--seed", type=int, default=0, help="of the world and of the run (default: 0)")


def _with_dataset(p):
    p.add_argument("dataset", help=NAMES)
    p.add_argument("root", help="the folder of the data set, as downloaded")
    p.add_argument("--option", type=_pair, action="append", default=[], metavar="NAME=VALUE", help=OPTION)
    return p


def _with_device(p):
    p.add_argument("--device", help="cpu, cuda, cuda:1 ...; by default the GPU when there is one")
    return p


def _with_reading(p):
    p.add_argument(
        "--skip-unreadable", action="store_true", help="leave out images that cannot be read, and list them"
    )
    p.add_argument(
        "--batch-size",
        type=int,
        default=256,
        help="images at a time (default: 256), halved when too many",
    )
    return p


def _pair(text):
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.replace("-", "_"), {"none": None, "true": True, "false": False}.get(value.lower(), value)

"""The commands of `ecul`: each is a thin caller of the Python functions, in the order of its help."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import ecul
from ecul import MODALITIES
from ecul.common.names import shorten
from ecul.common.tables import FORMATS
from ecul.config import DATASETS, METHODS, Config
from ecul.shell import arg, command, main, numbers, pair, parser

__all__ = ["main", "parser"]
VALIDATE = "hold out people (a fifth, or --option validation=0.1) and evaluate them every N epochs"
FLAG: dict[str, Any] = {"action": "store_true"}
PIXELS: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("H", "W")}
PAIRS: dict[str, Any] = {"type": pair, "action": "append", "default": []}
SKIPPING = arg("--skip-unreadable", **FLAG, help="leave out unreadable images, as a run that was trained so")
DATASET = (
    arg("dataset", help="sysu, regdb, llcm, market, or folders (yours: root/visible and root/infrared)"),
    arg("root", help="the folder of the data set, as downloaded"),
    arg("--option", **PAIRS, metavar="NAME=VALUE", help="of open_dataset, such as trial=1; may be repeated"),
    SKIPPING,
)
MODEL = (
    arg("--model", help="a run directory, a directory of save_pretrained, or a model.safetensors"),
    arg("model", nargs="?", default=argparse.SUPPRESS, help="the same without --model"),
)
DEVICE = arg("--device", help="cpu, cuda, cuda:1 ...; by default the GPU when there is one")
FORMAT = arg("--format", choices=FORMATS, default="text", help="of the table (default: text)")
JSON = arg("--json", **FLAG, help="print JSON instead of text")
OUTPUT = arg("-o", "--output", required=True, help="the file or directory to write")
PICTURE = arg("-o", "--output", help="a .png to draw the result in")
ROOT = arg("--root", help="the folder of the data set (default: its place in training)")
PRESET = arg("--preset", choices=DATASETS, help="whose settings (default: the run's, else the data set's)")
METHOD = arg("--method", choices=METHODS, help="the method (default: united)")
RERANK = arg(
    "--rerank", nargs="?", const="k-reciprocal", choices=("k-reciprocal", "modality"),
    help="(after the other arguments) re-rank by neighbours; modality counts both modalities alike",
)  # fmt: skip


@command(
    "Train without identity labels; the run directory holds model, log and configuration.",
    *DATASET, DEVICE, METHOD, OUTPUT, PRESET,
    arg("--resume", **FLAG, help="continue the run, with its settings unless --preset or --config is given"),
    arg("--config", metavar="FILE", help="settings to start from, such as a run's config.json"),
    arg("--validate", type=int, default=0, metavar="N", help=VALIDATE),
    arg("--log", choices=("csv", "tensorboard"), help="also write log.csv or TensorBoard's files"),
    arg("--trials", type=numbers, help="RegDB: a run for each, in directories below; for instance 1-10"),
    arg("--set", **PAIRS, metavar="FIELD=VALUE", help="of Config, such as size=[256,128]; may be repeated"),
)  # fmt: skip
def train(args: argparse.Namespace) -> None:
    from ecul.common import distributed
    from ecul.config import read_fields
    from ecul.data.layouts import LAYOUTS
    from ecul.run.log import logger
    from ecul.run.saved import find_run, trial_directory

    given = {**({} if args.method is None else {"method": args.method}), **dict(args.set)}
    held = {"validation": 0.2} if args.validate and args.dataset in LAYOUTS else {}
    for trial in args.trials or [None]:
        output = trial_directory(args.output, trial)
        run = find_run(output) if args.resume else None
        options = {**held, **_options(args, run), **({} if trial is None else {"trial": trial})}
        dataset = ecul.open_dataset(args.dataset, args.root, **options)
        fields = {} if args.config is None else read_fields(args.config)
        if run is not None and args.config is args.preset is None:
            fields = run.config.to_dict()
        method = fields.get("method")
        if args.config and method and given.get("method", method) != method:
            raise ValueError(f"--config has the fields of method {method}: leave out --method, or --config")
        config = Config.preset(args.preset or dataset.protocol or "sysu", **{**fields, **given})
        hook = None if args.log is None else logger(args.log, output)
        about = {"resume": args.resume, "device": args.device, "validate": args.validate}
        done = ecul.train(dataset, config, output=output, on_epoch=hook, **about)
        if distributed.rank() == 0:
            print(f"the model after epoch {len(done.history)} is {output / 'model.safetensors'}")
    distributed.stop()


@command(
    "List the fields of Config with their values and what they mean, as --set FIELD=VALUE takes them.",
    arg("--preset", choices=DATASETS, default="sysu", help="whose values (default: sysu)"),
    METHOD,
)  # fmt: skip
def config(args: argparse.Namespace) -> None:
    values = Config.preset(args.preset, args.method or "united").to_dict()
    for own in dataclasses.fields(Config):
        value, rule = json.dumps(values[own.name]), own.metadata["rule"]
        print(f"{own.name}={value}: {own.metadata['about']}. It must {rule.words}.")


@command(
    "Evaluate a trained model with the data set's published protocol; several models are averaged.",
    *DATASET, DEVICE,
    arg("--model", nargs="+", help="models or runs; the directory of train --trials is all its runs"),
    arg("model", nargs="*", default=argparse.SUPPRESS, help="the same without --model"),
    arg("--modes", nargs="+", help="rows of the protocol, for instance all indoor (default: all rows)"),
    arg("--shots", type=int, nargs="+", help="SYSU-MM01: gallery images an identity and camera: 1, 10"),
    arg("--draw", default="random", help="random, or the path of SYSU-MM01's rand_perm_cam.mat"),
    RERANK, FORMAT,
)  # fmt: skip
def evaluate(args: argparse.Namespace) -> None:
    from ecul.evaluation.protocols import average
    from ecul.run.saved import find_run, find_trials

    paths = [path for given in args.model for path in find_trials(given)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"--model names a model twice: {shorten(map(str, paths))}")
    options = [_options(args, find_run(path)) for path in paths]
    about = {"modes": args.modes, "shots": args.shots, "draw": args.draw, "rerank": args.rerank}
    found = []
    for path, known in zip(paths, options, strict=True):
        if "validation" not in dict(args.option):  # the test people, whatever training held out
            known.pop("validation", None)
        model = _model(args, path)
        found.append(ecul.evaluate(model, ecul.open_dataset(args.dataset, args.root, **known), **about))
    print((average(found) if len(found) > 1 else found[0]).table(args.format))


@command(
    "Compare runs: the settings that differ, accuracy, label-free score and time, averaged over seeds.",
    arg("runs", metavar="RUN", nargs="+", help="directories that train wrote, or one of train --trials"),
    ROOT, PICTURE, FORMAT, DEVICE,
)  # fmt: skip
def compare(args: argparse.Namespace) -> None:
    from ecul.report.pictures import prepare_picture
    from ecul.tools.compare import compare

    prepare_picture(args.output)
    found = compare(args.runs, root=args.root, device=args.device)
    print(found.table(args.format))
    if args.output:
        found.draw(args.output)


@command(
    "Draw a run: curves, ranked lists, clusters and matches as PNGs and in one HTML page.",
    arg("run_directory", metavar="RUN", help="the directory that train wrote"),
    ROOT, DEVICE,
    arg("--queries", type=int, default=6, help="ranked lists to draw (default: 6)"),
    arg("--top", type=int, default=10, help="answers in each (default: 10)"),
)  # fmt: skip
def report(args: argparse.Namespace) -> None:
    from ecul.report.page import report

    options = {"root": args.root, "queries": args.queries, "top": args.top, "device": args.device}
    print(report(args.run_directory, **options))


@command(
    "Write the features of a folder's images as safetensors, with their names and the model's hash.",
    *MODEL[::-1],
    arg("folder", help="a folder of images, read with all its sub-folders, or one image"),
    arg("--modality", required=True, choices=MODALITIES, help="of these images"),
    OUTPUT, SKIPPING, DEVICE,
)  # fmt: skip
def extract(args: argparse.Namespace) -> None:
    from ecul.common.files import prepare_output
    from ecul.features import extract_files
    from ecul.tools.search import image_files, save_features

    prepare_output(args.output, ".safetensors")
    files = image_files(args.folder)
    found = extract_files(_model(args), files, args.modality, skip_unreadable=_skips(args))
    save_features(args.output, found, args.model)
    print(f"{len(found.paths)} features are in {args.output}")


@command(
    "Rank a gallery's images for each query; print the answers, and draw them if asked to.",
    *MODEL,
    arg("--query", required=True, help="an image, or a folder of images"),
    arg("--gallery", required=True, help="the folder of images to search"),
    arg("--query-modality", required=True, choices=MODALITIES, help="of the queries"),
    arg("--gallery-modality", required=True, choices=MODALITIES, help="of the gallery"),
    arg("--top", type=int, default=10, help="answers to each query (default: 10)"),
    PICTURE, RERANK, SKIPPING, DEVICE, JSON,
)  # fmt: skip
def search(args: argparse.Namespace) -> None:
    from ecul.report.pictures import draw_ranking, prepare_picture
    from ecul.tools.search import search
    from ecul.tools.threshold import Threshold

    prepare_picture(args.output)
    model = _model(args)
    options = {"top": args.top, "rerank": args.rerank, "skip_unreadable": _skips(args)}
    options["threshold"] = Threshold.load(args.model, model.sha256)
    ranking = search(model, args.query, args.gallery, args.query_modality, args.gallery_modality, **options)
    print(json.dumps(ranking.to_dict(), indent=2) if args.json else ranking.table())
    if args.output:
        draw_ranking(args.output, ranking)


@command(
    "Bring in a published checkpoint (AGW, ADCA, PGM, MBCCM layouts) as a model of this library.",
    arg("file", help="a .pth, .tar or .safetensors file; code in it is never run"),
    OUTPUT,
    arg("--size", **PIXELS, default=(288, 144), help="of its training images (default: 288 144)"),
    arg("--pooling", choices=("gem", "avg"), default="file", help="gem for ADCA and PGM, avg for AGW's base"),
)  # fmt: skip
def import_(args: argparse.Namespace) -> None:
    from ecul.importers import import_checkpoint
    from ecul.run.saved import find_run

    if find_run(args.output) is not None:
        raise ValueError(f"output: {args.output} holds a run of train; choose another directory")
    model, unused = import_checkpoint(args.file, args.size, args.pooling)
    for reason, names in unused.items():
        print(f"left out, {reason}: {shorten(names, 1)}")
    model.save_pretrained(args.output, {"imported_from": Path(args.file).name})
    print(f"a ResNet-{model.settings['depth']} is in {args.output}")


@command(
    "Write one modality of a model as ONNX (.onnx) or as a torch.export program (.pt2).",
    *MODEL, OUTPUT,
    arg("--modality", required=True, choices=MODALITIES, help="of the images that the program takes"),
    DEVICE,
)  # fmt: skip
def export(args: argparse.Namespace) -> None:
    from ecul.tools.export import export

    export(_model(args), args.output, args.modality)
    print(f"pixels (N, 3, H, W) from 0 to 255 in, unit features out: {args.output}")


@command(
    "Try k1 and eps on a model's features of the training images: clusters, outliers, label-free score.",
    *DATASET, *MODEL, PRESET, PICTURE, DEVICE,
)  # fmt: skip
def tune(args: argparse.Namespace) -> None:
    from ecul.report.pictures import prepare_picture
    from ecul.tools.tuning import tune_config

    prepare_picture(args.output)
    found = tune_config(*_trained(args))
    print(found)
    if args.output:
        found.draw(args.output)


@command(
    "Learn which similarity means the same person, and save it beside the model, where search reads it.",
    *DATASET, *MODEL, PRESET, DEVICE,
)  # fmt: skip
def threshold(args: argparse.Namespace) -> None:
    from ecul.tools.threshold import measure_threshold

    found = measure_threshold(*_trained(args))
    print(f"{found.told}\nkept in {found.save(args.model)}")


@command(
    "Compare a data set's folder with what was published; exit code 1 when something is wrong.",
    *DATASET, JSON,
    arg("--quick", **FLAG, help="count files without decoding every image"),
)  # fmt: skip
def check(args: argparse.Namespace) -> int:
    found = ecul.open_dataset(args.dataset, args.root, **_options(args)).check(decode=not args.quick)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0 if found.ok else 1


@command(
    "Render the synthetic world as JPEG files in SYSU-MM01's layout.",
    arg("root", help="the folder to write"),
    arg("--identities", type=int, default=96, help="training identities (default: 96)"),
    arg("--test-identities", type=int, help="more, held out for tests (default: half as many)"),
    arg("--images", type=int, default=4, help="images of each identity and camera (default: 4)"),
    arg("--size", **PIXELS, default=(64, 32), help="pixels (default: 64 32)"),
    arg("--seed", type=int, default=0, help="the same seed, the same images (default: 0)"),
    arg("--gap", type=float, default=0.0, help="0 to 1, how far apart the modalities are (default: 0)"),
)
def synthesize(args: argparse.Namespace) -> None:
    names = ("root", "identities", "test_identities", "images", "size", "seed", "gap")
    print(ecul.synthesize(**{name: getattr(args, name) for name in names}))


@command(
    "Render the synthetic world, check it, train without labels and evaluate, all in minutes.",
    arg("-o", "--output", default="runs/demo", help="the directory of the world and the run"),
    arg("--seed", type=int, default=0, help="of the world and of the run (default: 0)"),
    METHOD, DEVICE,
)  # fmt: skip
def demo(args: argparse.Namespace) -> None:
    from ecul.common.distributed import choose_device
    from ecul.optim import build_model

    output, device = Path(args.output), choose_device(args.device)
    dataset = ecul.open_dataset("sysu", ecul.synthesize(output / f"world-{args.seed}", seed=args.seed))
    print(dataset.check(decode=True))
    method = args.method or "united"
    config = Config.preset("demo", method=method, seed=args.seed)
    before = ecul.evaluate(build_model(config, device), dataset)
    run = ecul.train(dataset, config, output=output / f"{method}-{args.seed}", resume=True, device=device)
    after = ecul.evaluate(run.model, dataset)
    print(f"\nsynthetic world, held-out identities, before training\n{before.table()}")
    print(f"\nafter {len(run.history)} epochs without labels ({method})\n{after.table()}")
    print(f"\nthe run directory is {run.output}")


def _options(args: argparse.Namespace, run: Any = None) -> dict[str, Any]:
    """The options of open_dataset: those of the run's training, then those given."""
    given = {**({"skip_unreadable": True} if args.skip_unreadable else {}), **dict(args.option)}
    return given if run is None else run.options_for(args.dataset, given)


def _model(args: argparse.Namespace, path: Any = None) -> Any:
    from ecul.common.distributed import choose_device
    from ecul.model import load_model

    return load_model(path or args.model).to(choose_device(args.device))


def _trained(args: argparse.Namespace) -> tuple[Any, Any, Config]:
    """The model, its data set as in training, and the settings of the preset, else the run, else the data."""
    from ecul.run.saved import find_run

    run = find_run(args.model)
    dataset = ecul.open_dataset(args.dataset, args.root, **_options(args, run))
    known = Config.preset(args.preset or dataset.protocol or "sysu")
    return _model(args), dataset, known if run is None or args.preset else run.config


def _skips(args: argparse.Namespace) -> bool:
    """Whether unreadable images are left out: if asked for, here or in the model's training."""
    from ecul.run.saved import find_run

    run = find_run(args.model)
    return args.skip_unreadable or (run is not None and run.options.get("skip_unreadable", False))

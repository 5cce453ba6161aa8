"""A trained model as one program of one modality, for people who run it without this library.

    pixels (N, 3, H, W) float32, RGB in 0..255  ->  features (N, num_features) float32 unit rows

The program normalises the pixels and adds the mirror image of the test feature. The caller resizes images to
(H, W) with Pillow's LANCZOS, as in training. The file says so in the metadata of an ONNX model, or in
`about.json` of a `.pt2`.
"""

import io
import json
import logging
import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ecul import __version__
from ecul.augment import normalize
from ecul.common.files import prepare_output, write_file
from ecul.data.images import check_modality
from ecul.features import evaluating, require_model

OPSET = 18
DYNAMIC = ({0: torch.export.Dim("batch")},)


class Embedder(nn.Module):
    """One modality of a model: `extract`'s rows (N, num_features) from pixels (N, 3, H, W), 0 to 255."""

    def __init__(self, model: Any, modality: str) -> None:
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = normalize(pixels)
        both = [self.model.embed(view, self.modality) for view in (x, x.flip(3))]
        return F.normalize(both[0] + both[1], dim=1)


def export(model: Any, path: str | os.PathLike, modality: str) -> None:
    """Write `model` for one modality as `.onnx` or as a `torch.export` program, `.pt2`.

        onnxruntime.InferenceSession(path).run(None, {"pixels": pixels})[0]      # model.onnx
        torch.export.load(path).module()(pixels)                                 # model.pt2

    pixels: (N, 3, H, W) float32, RGB from 0 to 255, of the model's input_size; N is free. The result is what
    `extract(model, images, modality)` gives, (N, num_features) unit rows. model: with `embed` and
    `input_size`; it is left as it was. Errors: ValueError for an unknown modality or suffix; ImportError for
    ONNX without its packages (`pip install 'ecul[export]'`).
    """
    check_modality(modality)
    require_model(model)
    target = prepare_output(path, ".onnx", ".pt2")
    about = {"made_by": f"ecul {__version__}", "modality": modality, "input_size": list(model.input_size)}
    about |= {"pixels": "RGB, 0 to 255", "resize": "Pillow LANCZOS"}
    device = next(model.parameters()).device
    pixels = torch.zeros(2, 3, *model.input_size, dtype=torch.float32, device=device)
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        embedder = Embedder(model, modality)
        program = torch.export.export(embedder, (pixels,), dynamic_shapes=DYNAMIC, strict=True)
        if target.suffix == ".onnx":
            content = _onnx(program, about)
        else:
            buffer = io.BytesIO()
            torch.export.save(program, buffer, extra_files={"about.json": json.dumps(about)})
            content = buffer.getvalue()
    write_file(target, content)


def _onnx(program: torch.export.ExportedProgram, about: dict) -> bytes:
    names: dict = {"input_names": ["pixels"], "output_names": ["features"], "dynamic_shapes": DYNAMIC}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # not its warnings that torchvision, which is not needed, is absent
    try:
        converted: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
    finally:
        logger.setLevel(level)
    converted.model.metadata_props.update({name: str(value) for name, value in about.items()})
    return converted.model_proto.SerializeToString()

"""Published key layouts: the same embeddings, everything else named, nothing skipped in silence."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ecul import TwoStreamResNet
from ecul.importers import import_checkpoint


def trained(depth=18, width=8, non_local=False, gem=True):
    """A model whose every weight and statistic has moved from its start."""
    torch.manual_seed(3)
    model = TwoStreamResNet(depth, width, non_local, (32, 16), gem=gem)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.train()(torch.randn(4, 3, 32, 16), torch.randn(4, 3, 32, 16))
    return model.eval()


def published(model):
    """The model's weights as AGW and its descendants name them, with the halves that they never run."""
    shared = {k: v for k, v in model.state_dict().items() if k.startswith("layer")}
    stems = {"visible": "visible_module.visible", "infrared": "thermal_module.thermal"}
    state = {}
    for modality, home in stems.items():
        for name, value in getattr(model, modality).state_dict().items():
            state[f"{home}.{name}"] = value
            state[f"base_resnet.base.{name}"] = torch.full_like(value, 9)
        state.update({f"{home}.{name}": torch.full_like(value, 9) for name, value in shared.items()})
    state.update({f"base_resnet.base.{name}": value for name, value in shared.items()})
    state.update({f"bottleneck.{k}": v for k, v in model.bottleneck.state_dict().items()})
    for place in sorted(model.non_local):
        stage = place[0]
        number = [p for p in sorted(model.non_local) if p[0] == stage].index(place)
        for name, value in model.non_local[place].state_dict().items():
            state[f"NL_{stage}.{number}.{name.replace('g.', 'g.0.')}"] = value
    return {k: v.clone() for k, v in state.items()}


def same_embeddings(a, b):
    x = torch.randn(3, 3, 32, 16, generator=torch.Generator().manual_seed(1))
    return all(torch.equal(a.embed(x, m), b.embed(x, m)) for m in ("visible", "infrared"))


def before(prefix, state):
    return {prefix + name: value for name, value in state.items()}


ARGS = argparse.Namespace(lr=0.1, gpu=[0, 1])
HEAD, ADVERSARY = {"classifier.weight": torch.zeros(5, 512)}, {"disnet.ad_layer1.weight": torch.zeros(4, 512)}
LAYOUTS = {  # file contents by the name of who publishes them, and what training alone uses
    "AGW": (
        lambda s: {"net": s | HEAD, "cmc": np.array([0.5]), "mAP": np.float64(0.5), "args": ARGS},
        HEAD,
    ),
    "ADCA": (lambda s: {"state_dict": before("module.", s | HEAD)}, HEAD),
    "MBCCM": (lambda s: {"state_dict": before("module.", s | ADVERSARY), "epoch": 79}, ADVERSARY),
    "bare": (lambda s: s, {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_the_same_embeddings(name, tmp_path):
    model, (wrap, beside) = trained(), LAYOUTS[name]
    state = published(model)
    torch.save(wrap(state), tmp_path / "model.pth")
    imported, unused = import_checkpoint(tmp_path / "model.pth", (32, 16))
    assert same_embeddings(model, imported) and imported.input_size == (32, 16)
    names = [n for group in unused.values() for n in group]
    assert {"visible_module.visible.layer1.0.conv1.weight", "base_resnet.base.conv1.weight"} <= set(names)
    assert beside.keys() <= set(names)
    assert len(names) + len(model.state_dict()) == len(state) + len(beside)


def test_non_local_blocks_and_bottlenecks_find_their_places(tmp_path):
    model = trained(50, 8, non_local=True)
    torch.save({"net": published(model)}, tmp_path / "agw.pth")
    imported, _ = import_checkpoint(tmp_path / "agw.pth", (32, 16))
    assert imported.settings == model.settings and same_embeddings(model, imported)
    assert model.non_local["3_5"].W[1].weight.abs().sum() > 0


def test_a_model_pools_as_it_was_trained_and_as_the_file_tells(tmp_path):
    for pooling in ("gem", "avg"):
        model = trained(gem=pooling == "gem")
        save_file(published(model), tmp_path / "base.safetensors")
        imported, _ = import_checkpoint(tmp_path / "base.safetensors", (32, 16), pooling)
        imported.save_pretrained(tmp_path / "mine")
        assert same_embeddings(model, TwoStreamResNet.from_pretrained(tmp_path / "mine"))
    for state in (published(model) | {"gem.p": torch.ones(1)}, published(trained(50, 8, True))):
        torch.save(state, tmp_path / "gem.pth")
        assert import_checkpoint(tmp_path / "gem.pth", (32, 16), "file")[0].settings["gem"]
    for pooling in ("file", "max"):
        with pytest.raises(ValueError, match=f"does not say how the model pools; .* got '{pooling}'"):
            import_checkpoint(tmp_path / "base.safetensors", (32, 16), pooling)


def test_what_does_not_match_is_an_error_with_its_name(tmp_path):
    state, non_local = published(trained()), published(trained(50, 8, non_local=True))
    cases = {
        "for no known layout has attn_pool.weight": state | {"attn_pool.weight": torch.zeros(1)},
        "missing bottleneck.weight": {k: v for k, v in state.items() if k != "bottleneck.weight"},
        "layer2.0.conv1.weight is": state | {"base_resnet.base.layer2.0.conv1.weight": torch.zeros(1)},
        r"\(2, 2, 1, 2\) blocks in its layers": {k: v for k, v in state.items() if "base.layer3.1" not in k},
        "visible stem": {k: v for k, v in state.items() if "visible" not in k},
        "epoch, no tensors of weights": {"epoch": 3},
        "odd.pth is damaged": [torch.zeros(1)],
        "for no known layout has visible.conv1.weight": trained().state_dict(),
        r"theta.weight is \(32, 64": non_local | {"NL_2.0.theta.weight": torch.zeros(32, 64, 1, 1)},
        "unknown NL_2.2.g.0.bias": non_local | {"NL_2.2.g.0.bias": torch.zeros(1)},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=message):
            import_checkpoint(tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="at least 16 pixels, got"):
        import_checkpoint(tmp_path / "odd.pth", (4, 4))


class Code:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_code_in_a_checkpoint_is_never_run(tmp_path, capsys):
    torch.save({"net": published(trained()), "extra": Code()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth .*it holds .*print, which is code"):
        import_checkpoint(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""

"""Cascades as configurations: sizes, changes by name, storage, and what is refused."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fields import CONFIG

from jobs.presets import read_preset
from model.cascade.config import A, BlockConfig, CascadeConfig, TopConfig
from model.cascade.denoiser import CascadeDenoiser
from model.config import changed, config_from_dict, preset
from model.design import CascadeDesign, Extent, UniformDesign, WindowsBelow, make_design
from model.family import generated_level, make_denoiser, shares

TINY = preset("tiny", channels=3, token_dim=1024)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 3.06), ("small", 33), ("brush", 450)])
def test_presets_have_the_size_they_claim(name: str, millions: float) -> None:
    with torch.device("meta"):
        config = preset(name, channels=3, token_dim=1024)
        net = make_denoiser(config, config.octaves((0.1,) * 13, (0.1,) * 8))
    assert isinstance(net, CascadeDenoiser)
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert abs(count / millions - 1) < 0.05, count


@pytest.mark.parametrize("name", ["tiny", "small", "brush"])
def test_presets_are_trained_on_the_published_draws(name: str) -> None:
    """The packs do not depend on the size, so that all of them learn from the same ones."""
    config = preset(name, channels=3, token_dim=8)
    config.check_design(CascadeDesign())
    assert CascadeDesign().num_values(Extent(4096, 4096)) <= 65_536
    assert isinstance(config, CascadeConfig) and config.cell_px == 256
    assert sum(shares(config).values()) == pytest.approx(1.0)


@pytest.mark.parametrize("config", [CONFIG, TINY, preset("brush", channels=4, token_dim=8)])
def test_configurations_survive_json_and_unknown_keys_are_errors(config: CascadeConfig) -> None:
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_dict(stored) == config
    for block in stored["blocks"]:
        del block["lookups"]  # older runs looked tokens up once a parent
    older = config_from_dict(stored)
    assert isinstance(older, CascadeConfig)
    assert older.blocks == tuple(dataclasses.replace(b, lookups=1) for b in config.blocks)
    del stored["network"]
    with pytest.raises(ValueError, match=r"network is of form 1 .*; train again, and pack again"):
        config_from_dict(stored)
    stored["network"] = config.network
    with pytest.raises(ValueError, match="unknown keys \\['colour'\\]"):
        config_from_dict({**stored, "colour": 1})
    with pytest.raises(ValueError, match=r"joint pyramid's.*; pack and train again"):
        config_from_dict({"channels": 3, "token_dim": 8, "lattice_patch": 2})
    with pytest.raises(ValueError, match="choose one of tiny, small, brush"):
        preset("huge", channels=3, token_dim=8)


def test_fields_are_changed_by_name_and_those_of_a_block_by_its_name() -> None:
    found = changed(
        TINY,
        [
            *(
                "B.widths=64,160",
                "B.depths=1,3",
                "T.attention=softmax",
                "T.lookup=false",
            ),
            *("parents_noise=0.1", "C.evaluations=20"),
        ],
    )
    assert isinstance(found, CascadeConfig) and isinstance(TINY, CascadeConfig)
    top, a, b, c, _ = found.sequence
    assert isinstance(top, TopConfig) and isinstance(b, BlockConfig)
    assert (b.widths, b.depths, c.evaluations) == ((64, 160), (1, 3), 20)
    assert (top.attention, top.lookup, found.parents_noise) == ("softmax", False, 0.1)
    # Fields that suit each other alone are changed together.
    patched = changed(TINY, ["B.place=4", "B.widths=64", "B.depths=2"])
    assert isinstance(patched, CascadeConfig) and patched.blocks[1].place == 4
    # Nothing else.
    assert a == A
    assert changed(found, ["parents_noise=0.08"]) != TINY
    back = [
        *("B.widths=64,96", "B.depths=1,2", "T.attention=operator"),
        *("T.lookup=true", "parents_noise=0.08", f"C.evaluations={TINY.blocks[2].evaluations}"),
    ]
    assert changed(found, back) == TINY


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("E.widths=8", "whose blocks are: T, A, B, C, D"),
        ("B.colour=8", "changes no field of this preset; write NAME=VALUE .* one of place, wid"),
        ("B.widths=8,x,8", "so it takes a value of that kind, not '8,x,8'"),
        ("B.widths=8,16,8", "has 3 widths and 2 depths; give one of each"),
        ("B.place=4", "the coarsest of 8 cells, but a parent has 4; make them equal"),
        ("A.lookups=0", "looks tokens up at 0 x 0 places in a parent cell; 1 or more"),
        ("T.attention=lookup", "'lookup' does not exist; choose one of operator, softmax, none"),
        ("T.heads=5", "a width of 64 does not divide into 5 heads"),
        ("T.training_side=0", "windows of one cell or more, not 0"),
        ("T.share=0", "block T needs a positive share of the training, not 0"),
        ("C.evaluations=0", "block C needs one evaluation or more, not 0"),
        ("B.autoguidance=0.5", r"block B takes autoguidance of 1 \(none\) or more, not 0.5"),
        ("T.level=7", "changes no field of this preset"),
        ("B.window=16", "changes no field of this preset"),
        ("channels=4", "changes no field of this preset"),
        ("parents_noise", "changes no field of this preset"),
    ],
)
def test_what_is_no_cascade_is_a_sentence(change: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        changed(TINY, [change])


def test_a_preset_may_be_a_file_of_what_differs(tmp_path: Path) -> None:
    """And packs are made for its blocks: those of --blocks suit, others do not."""
    a, b, _, d = TINY.blocks
    mine = (a, replace(b, fine=2, widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), window=4), d)
    wanted = replace(TINY, token_dim=8, blocks=mine, parents_noise=0.1)
    file = tmp_path / "mine.json"
    content = {"base": "tiny", "parents_noise": 0.1}
    content["blocks"] = [dataclasses.asdict(block) for block in wanted.blocks]
    file.write_text(json.dumps(content))
    assert read_preset(str(file), channels=3, token_dim=8) == wanted
    blocks = [(8, 6, 8), (6, 2, 4), (2, 0, 32)]
    wanted.check_design(make_design("cascade", points=65_536, blocks=blocks))
    with pytest.raises(ValueError, match=r"pack again \(--blocks 8:6:8 6:2:4 2:0:32\)"):
        wanted.check_design(CascadeDesign())
    for text, said in (
        ("{", "is no file of a preset"),
        ("[]", "is no file of a preset"),
        ("{}", "is no file of a preset \\('base'\\)"),
        ('{"base": "huge"}', "choose one of tiny"),
        ('{"base": "tiny", "colour": 1}', "unknown keys \\['colour'\\]"),
        ('{"base": "tiny", "blocks": [{"name": "A"}]}', "blocks with all of theirs"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_preset(str(file), channels=3, token_dim=8)
    with pytest.raises(ValueError, match="No such file"):
        read_preset(str(tmp_path / "none.json"), channels=3, token_dim=8)


def test_blocks_join_down_to_the_pixel() -> None:
    assert [block.octaves for block in TINY.blocks] == [2, 2, 2, 2]
    assert [generated_level(TINY, level) for level in range(9)] == [0, 0, 2, 2, 4, 4, 6, 6, 6]
    with pytest.raises(ValueError, match="from level 2 to 5, but a block goes from coarse"):
        BlockConfig("A", 2, 5, 2, (8,), (1,))
    with pytest.raises(ValueError, match="takes parents of level 8, but the block before it"):
        CascadeConfig(channels=3, token_dim=8, top=TopConfig(level=7))
    with pytest.raises(ValueError, match="need different names"):
        CascadeConfig(channels=3, token_dim=8, top=TopConfig(name="A"))
    with pytest.raises(ValueError, match="the last of a cascade ends at 0"):
        CascadeConfig(channels=3, token_dim=8, blocks=(A,))
    with pytest.raises(ValueError, match="whose blocks are: none"):
        changed(preset("patch", channels=3, token_dim=8), ["B.widths=8"])


def test_draws_and_pictures_that_do_not_suit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs --design cascade with windows 8x8 of level 8"):
        TINY.check_design(UniformDesign())
    other = CascadeDesign(
        blocks=(WindowsBelow(6, 8, 4), WindowsBelow(2, 6, 4), WindowsBelow(0, 2, 32))
    )
    with pytest.raises(ValueError, match="pack again"):
        TINY.check_design(other)
    with pytest.raises(ValueError, match="packs made with --mollifier 0"):
        TINY.check_design(CascadeDesign(), 1.0)
    with pytest.raises(ValueError, match="knows nothing finer; leave --scale"):
        TINY.check_painting(None, 256, 256, level=-1)
    with pytest.raises(ValueError, match="leave --overlap out"):
        TINY.check_painting(0.5, 256, 256, level=0)

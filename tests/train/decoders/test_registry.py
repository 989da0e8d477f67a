"""The registry of decoders: built-in families, those of packages, and the example in the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

import pytest
import torch

from gridcap.common.config import DecoderConfig, DecoderSettings, PipelineConfig, load_config
from gridcap.common.errors import ConfigError, UserError
from gridcap.train.decoders import registry
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.lstm import LstmConfig, LstmDecoder
from gridcap.train.decoders.registry import DECODER_CONFIGS, build_decoder, register_decoder, resolve_decoder


@pytest.fixture(autouse=True)
def _restore_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    list(DECODER_CONFIGS)  # a module registers its decoder only when it is imported for the first time
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_the_registry_lists_the_built_in_families() -> None:
    assert list(DECODER_CONFIGS) == ["attention", "lstm", "transformer"]
    assert DECODER_CONFIGS["lstm"] is LstmConfig
    assert "gpt" not in DECODER_CONFIGS
    assert "base" not in DECODER_CONFIGS, "a module that is no decoder"


def test_settings_are_completed_and_checked_when_they_are_resolved() -> None:
    raw = PipelineConfig.model_validate({"train": {"decoder": {"family": "lstm", "hidden_size": 5}}})
    assert type(raw.train.decoder) is DecoderSettings
    resolved = resolve_decoder(raw)
    assert resolved.train.decoder == LstmConfig(hidden_size=5)
    assert resolve_decoder(resolved) == resolved
    assert resolved.model_dump()["train"]["decoder"]["embed_size"] == 256, "all settings are saved"
    assert raw.train.model_dump()["decoder"] == {"family": "lstm", "hidden_size": 5}


def test_changed_settings_contain_the_family_and_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["train.decoder={family: lstm, hidden_size: 8, dropout: 0.3}"]
    changed = {"train.decoder.family": "lstm", "train.decoder.hidden_size": 8}
    assert load_config(None, None, sets, decoders=DECODER_CONFIGS).changed_settings() == changed
    assert load_config(None, None, sets).changed_settings() == changed | {"train.decoder.dropout": 0.3}


def test_commands_that_need_no_decoder_accept_any_settings_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text("train: {decoder: {family: theirs, size: 3}}\n")
    assert load_config().train.decoder.family == "theirs"
    with pytest.raises(ConfigError, match=r"^pipeline\.yaml: train\.decoder\.family: must be .*given: 'theirs'"):
        load_config(decoders=DECODER_CONFIGS)


def test_an_unknown_family_is_an_error_that_lists_the_others() -> None:
    with pytest.raises(UserError, match="'gpt': unknown family") as caught:
        build_decoder(DecoderSettings(family="gpt"), 9, (2, 2, 8))
    assert "attention, lstm, transformer" in str(caught.value.hint)


def test_a_name_is_registered_once_and_equals_that_of_the_configuration() -> None:
    assert register_decoder("lstm")(LstmDecoder) is LstmDecoder

    class Other(LstmDecoder):
        pass

    with pytest.raises(ValueError, match="already registered"):
        register_decoder("lstm")(Other)
    with pytest.raises(ValueError, match="LstmConfig: family must have the default 'other'"):
        register_decoder("other")(Other)


def test_a_package_announces_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    class PluginConfig(LstmConfig):
        family: Literal["plugin"] = "plugin"  # type: ignore[assignment]

    class Point:
        def load(self) -> None:
            @register_decoder("plugin")
            class PluginDecoder(LstmDecoder):
                config_class = PluginConfig

    monkeypatch.setattr(registry, "_entry_points", lambda: {"plugin": Point()})
    assert list(DECODER_CONFIGS) == ["attention", "lstm", "plugin", "transformer"]
    assert DECODER_CONFIGS["plugin"] is PluginConfig
    decoder = build_decoder(DecoderSettings(family="plugin", hidden_size=7), 9, (2, 2, 8))
    assert (type(decoder).__name__, decoder.lstm.hidden_size) == ("PluginDecoder", 7)


def test_the_example_in_the_documentation_is_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.search(r'```python\n("""A decoder that.*?)```', page, re.DOTALL)
    assert code is not None
    (tmp_path / "average.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    point = metadata.EntryPoint("average", "average", registry.GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"average": point})
    config: type[DecoderConfig] = DECODER_CONFIGS["average"]
    decoder: Decoder = build_decoder(config(hidden_size=5, dropout=0.1), 9, (2, 2, 8)).eval()
    tokens = torch.randint(9, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    memory = decoder.encode(torch.randn(3, 4, 8))
    logits, _ = decoder(memory, tokens)
    steps = [decoder.step(tokens[..., t], (), memory)[0] for t in range(5)]
    torch.testing.assert_close(torch.stack(steps, 2), logits)
    assert decoder(memory, tokens, torch.tensor([0, 7]))[0].shape == (2, 9)


def test_the_registry_and_a_configuration_load_without_torch() -> None:
    code = (
        "import sys; from gridcap.train.decoders.registry import DECODER_CONFIGS; "
        "from gridcap.common.config import load_config; load_config(); "
        "assert 'torch' not in sys.modules; 'lstm' in DECODER_CONFIGS; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])

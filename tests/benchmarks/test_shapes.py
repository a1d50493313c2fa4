# SPDX-License-Identifier: Apache-2.0
"""The shapes of models that benchmarks run."""

import json
from pathlib import Path

import pytest
import shapes


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "billions"),
        [
            ("qwen3-0.6b", 0.596),
            ("qwen3-8b", 8.19),
            ("llama-3-8b", 8.03),
            ("qwen3-30b-a3b", 30.5),
            ("qwen3-next-80b-a3b", 79.7),
            ("qwen3.5-35b-a3b", 34.7),
            ("gpt2-xl", 1.557),
            ("deepseek-v3", 671),
        ],
    )
    def test_the_weights_add_up_to_the_published_size(self, name: str, billions: float) -> None:
        assert shapes.load_shape(name).weight_count() / 1e9 == pytest.approx(billions, rel=2e-3)

    def test_a_cut_shape_differs_in_nothing_but_its_layers(self) -> None:
        whole, cut = shapes.load_shape("llama-3-8b").config, shapes.load_shape("llama-3-8b:4").config
        assert cut == {**whole, "num_hidden_layers": 4}
        assert shapes.load_shape("qwen3-8b:2").config["max_window_layers"] == 2

    def test_a_hybrid_has_states(self) -> None:
        """A state of Qwen3-Next is 32 matrices of 128 × 128 in fp32, and three tokens of 8192 numbers in bf16."""
        cut = shapes.load_shape("qwen3-next-80b-a3b:4")
        assert cut.state_bytes() == 3 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
        assert cut.kv_numbers_per_token() == 2 * 2 * 256
        assert shapes.load_shape("qwen3-8b").state_bytes() == 0
        with pytest.raises(shapes.UnknownShape, match="full attention in each 4th layer"):
            shapes.load_shape("qwen3-next-80b-a3b:3")

    def test_latent_attention_and_fp8_take_less(self) -> None:
        """DeepSeek-V3 keeps 576 numbers of a token in each layer; its weights are in fp8, its embeddings in bf16."""
        whole = shapes.load_shape("deepseek-v3")
        assert whole.kv_numbers_per_token() == 61 * 576
        assert whole.weight_bytes() / 1e9 == pytest.approx(673, rel=2e-3)
        assert shapes.load_shape("qwen3-8b").weight_bytes() == 2 * shapes.load_shape("qwen3-8b").weight_count()

    @pytest.mark.parametrize("text", ["qwen3-8b:0", "qwen3-8b:37", "qwen3-8b:x", "qwen3-8b:"])
    def test_a_shape_has_so_many_layers(self, text: str) -> None:
        with pytest.raises(shapes.UnknownShape, match="from 1 to 36"):
            shapes.load_shape(text)

    def test_an_unknown_shape_names_the_nearest(self) -> None:
        with pytest.raises(shapes.UnknownShape, match="did you mean 'llama-3-8b'"):
            shapes.load_shape("llama3-8b")

    def test_a_model_is_served_from_its_directory(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(shapes.SHAPES["tiny"]))
        assert shapes.load_shape(str(tmp_path)).write(tmp_path / "elsewhere") == tmp_path

    def test_a_shape_is_written(self, tmp_path: Path) -> None:
        directory = shapes.load_shape("tiny:2").write(tmp_path / "model")
        assert json.loads((directory / "config.json").read_text())["num_hidden_layers"] == 2

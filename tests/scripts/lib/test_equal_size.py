import pytest
from lib.equal_size import matching, parameter_count
from transformers import LlamaConfig


def recipe(width: int, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=2
    )


@pytest.mark.parametrize("width", [8, 40, 104])
def test_the_nearest_width_is_found(width: int):
    target = parameter_count(recipe(width)) + 100  # a width is 192 parameters
    assert matching(target, [recipe], range(8, 112, 8), "Llama").intermediate_size == width


def test_the_first_recipe_that_comes_near_is_taken():
    target = parameter_count(recipe(64, layers=3))
    config = matching(
        target, [lambda layers: recipe(2000, layers), lambda layers: recipe(64, layers)], range(1, 9), "L"
    )
    assert (config.intermediate_size, config.num_hidden_layers) == (64, 3)


@pytest.mark.parametrize("target", [100, 10_000_000])
def test_a_size_that_is_out_of_reach(target: int):
    with pytest.raises(ValueError, match=rf"no Llama has {target:,} parameters \(±2%\)"):
        matching(target, [recipe], range(8, 80, 8), "Llama")

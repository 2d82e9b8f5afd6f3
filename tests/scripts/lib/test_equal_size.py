from functools import partial

import pytest
from lib.equal_size import matching, nearest_widths, parameter_count
from transformers import LlamaConfig


def recipe(**fields) -> LlamaConfig:
    return LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2} | fields
    )


@pytest.mark.parametrize("width", [8, 40, 104])
def test_the_nearest_width_is_found(width: int):
    target = parameter_count(recipe(intermediate_size=width)) + 100  # a width is 192 parameters
    assert matching(target, [recipe], "intermediate_size", range(8, 112, 8), "Llama").intermediate_size == width


def test_the_first_recipe_that_comes_near_is_taken():
    target = parameter_count(recipe(intermediate_size=64, num_hidden_layers=3))
    recipes = [partial(recipe, intermediate_size=width) for width in (2000, 64, 63)]
    config = matching(target, recipes, "num_hidden_layers", range(1, 9), "Llama")
    assert (config.intermediate_size, config.num_hidden_layers) == (64, 3)


def test_widths_from_the_nearest_on():
    assert nearest_widths(50, 16, 100) == [48, 64, 32, 80, 16, 96]


@pytest.mark.parametrize("target", [100, 10_000_000])
def test_a_size_that_is_out_of_reach(target: int):
    with pytest.raises(ValueError, match=rf"no Llama has {target:,} parameters \(±2%\)"):
        matching(target, [recipe], "intermediate_size", range(8, 80, 8), "Llama")

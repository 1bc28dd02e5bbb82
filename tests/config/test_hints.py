"""Words of other tools: each stands for one of our keys."""

from pydantic import BaseModel

from fedray.config import hints
from fedray.config.messages import keys_of
from fedray.config.run_config import RunConfig


def test_every_word_stands_for_one_key_that_there_is():
    words = [word for text in hints._WORDS.values() for word in text.split()]
    assert len(words) == len(set(words))
    keys = set(keys_of(RunConfig))
    assert {meant.key for meant in hints.WORDS.values()} <= keys
    assert not {word for word in words if word in keys}


def test_a_config_without_methods_hints_at_its_own_keys_only():
    class Other(BaseModel):
        rounds: int = 1

    assert keys_of(Other) == ["rounds"]
    assert hints.for_key("num_rounds", 3, keys_of(Other), "") == "; did you mean 'rounds'?"
    assert hints.for_key("sparsity", 0.5, keys_of(Other), "") == "."

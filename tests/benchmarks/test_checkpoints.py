"""Random-weight checkpoints: the shapes they claim, readable by slotwise, and the same model for llama.cpp."""

import pytest
import torch
from sidebyside.gguf_files import gguf_name, interleave_rotary
from sidebyside.shapes import SHAPES, make_checkpoint, make_tokenizer, whole_folder

import slotwise
from slotwise.models.load import load_model


@pytest.mark.parametrize(("name", "parameters"), [("135M", 134_515_008), ("1B", 1_235_814_400)])
def test_a_shape_has_the_parameters_of_the_model_it_is_named_after(name, parameters):
    assert SHAPES[name].parameters == parameters


def test_a_checkpoint_is_made_once_and_slotwise_generates_from_it(tmp_path):
    folder = make_checkpoint(SHAPES["tiny"], tmp_path)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_checkpoint(SHAPES["tiny"], tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert load_model(folder).spec.vocab_size == SHAPES["tiny"].vocab
    llm = slotwise.LLM(folder, backend="reference", capacity=32, max_sequences=1)
    completion = llm.generate([5, 6, 7], slotwise.Sampling(max_new_tokens=3, ignore_eos=True))
    assert len(completion.token_ids) == 3


def test_a_tokenizer_has_exactly_the_tokens_asked_for():
    assert make_tokenizer(1000).get_vocab_size() == 1000
    assert make_tokenizer(1000).decode(make_tokenizer(1000).encode("snow, née").ids) == "snow, née"


def test_a_folder_that_could_not_be_filled_is_not_there(tmp_path):
    def fill():
        with whole_folder(tmp_path / "checkpoint") as made:
            (made / "part").write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        fill()
    assert not list(tmp_path.iterdir())


def test_every_tensor_of_a_shape_has_a_gguf_name_of_its_own():
    shape = SHAPES["tiny"]
    names = [gguf_name(name) for name in (*shape.matrices, *shape.norms)]
    assert len(set(names)) == len(names) == 2 + 9 * shape.layers


def test_scores_are_the_same_whether_halves_or_neighbours_are_rotated():
    heads, size, hidden = 3, 8, 16
    source = torch.Generator().manual_seed(1)
    x, q, k = (torch.randn(n, hidden, generator=source, dtype=torch.float64) for n in (1, heads * size, heads * size))
    angles = torch.arange(size // 2, dtype=torch.float64) + 0.5

    def rotated(first, second):
        return first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()

    def by_halves(vectors):
        return torch.cat(rotated(*vectors.chunk(2, -1)), -1)

    def by_neighbours(vectors):
        return torch.stack(rotated(vectors[..., ::2], vectors[..., 1::2]), -1).flatten(-2)

    def scores(rotate, q_weight, k_weight):
        queries, keys = ((x @ w.T).view(heads, size) for w in (q_weight, k_weight))
        return (rotate(queries) * keys).sum(-1)

    expected = scores(by_halves, q, k)
    moved = scores(by_neighbours, interleave_rotary(q, heads), interleave_rotary(k, heads))
    torch.testing.assert_close(moved, expected)
    assert not torch.allclose(scores(by_neighbours, q, k), expected)

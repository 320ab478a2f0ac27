"""The text tokenizer is trained on all texts of the shards and on nothing else."""

import pytest

from mixmodal.data.shards import Sample, write_shards
from mixmodal.data.skipping import SampleLimits, TooManySkipped
from mixmodal.tokenization.text import TextTokenizer, train_text_tokenizer
from mixmodal.training.text_tokenizer import TextTokenizerTrainingConfig, train_text_tokenizer_on_shards


def test_tokenizer_of_shards_is_that_of_their_texts(tmp_path):
    texts = [f"thing {number}, flat style" for number in range(30)]
    samples = [Sample(f"{number:03d}", (text, "and more")) for number, text in enumerate(texts)]
    write_shards(samples[:20], tmp_path / "a", shard_size=7)
    write_shards(samples[20:], tmp_path / "b")
    config = TextTokenizerTrainingConfig(
        shards=(tmp_path / "a", tmp_path / "b"), out=tmp_path / "out" / "text_tokenizer.model", vocab_size=300
    )
    trained = train_text_tokenizer_on_shards(config)
    expected = train_text_tokenizer(
        [text for sample in samples for text in sample.texts], tmp_path / "expected.model", vocab_size=300
    )
    assert trained.sha256 == TextTokenizer.load(config.out).sha256 == expected.sha256


def test_bad_samples_fail_the_training_and_leave_no_tokenizer(tmp_path):
    write_shards([Sample("a", ("fine",)), Sample("b", (" ",))], tmp_path / "a")
    config = TextTokenizerTrainingConfig(
        shards=(tmp_path / "a",), out=tmp_path / "t.model", limits=SampleLimits(max_skipped_share=0.1)
    )
    with pytest.raises(TooManySkipped, match=r"00000\.tar:b: the text is empty"):
        train_text_tokenizer_on_shards(config)
    assert not config.out.exists()

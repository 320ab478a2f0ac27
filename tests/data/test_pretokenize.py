"""Token shards hold exactly what the tokenizers give, go on after a break, and name what does not fit."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mixmodal.data.augment import AugmentConfig
from mixmodal.data.pretokenize import PretokenizeConfig, Pretokenizer, pretokenize
from mixmodal.data.shards import INDEX_NAME, PictureFile, Sample, read_samples
from mixmodal.data.skipping import SampleLimits, TooManySkipped
from mixmodal.data.token_shards import TokenShards, is_token_shard
from mixmodal.document import Document, Image, Text
from mixmodal.manifests import MANIFEST_NAME
from mixmodal.tokenization.autoencoder import AutoencoderConfig
from mixmodal.tokenization.image import ImageTokenizer, ImageTokenizerConfig
from mixmodal.tokenization.preprocessing import resize_and_crop, to_tensor
from mixmodal.tokenization.quantizer_base import QuantizerConfig
from mixmodal.tokenization.text import TextTokenizer, train_text_tokenizer
from mixmodal.tokenization.text_files import load_text_tokenizer

SHIFTS = AugmentConfig(move_share=1.0, max_shift=0.3)


@pytest.fixture
def build(tmp_path, text_tokenizer_path, image_tokenizer):
    """A pretokenizer with the small tokenizers; options go to the config."""

    def build(shards, **options):
        options = {"limits": SampleLimits(max_skipped_share=1.0), "batch_size": 2, "num_sentinels": 4} | options
        config = PretokenizeConfig(
            shards=(shards,), out=tmp_path / "tokens", text_tokenizer=text_tokenizer_path,
            image_tokenizer=tmp_path / "unused", **options,
        )  # fmt: skip
        return Pretokenizer(config, TextTokenizer.load(text_tokenizer_path), image_tokenizer, 4, "0" * 64)

    return build


def expected_document(sample, image_tokenizer):
    def part(part):
        if isinstance(part, str):
            return Text(part)
        image = to_tensor(resize_and_crop(part.open(1000), 4))
        return Image(image_tokenizer.encode(image[None])[0].numpy())

    return Document(map(part, sample.parts))


@pytest.mark.parametrize("sequence_format", ["cm3leon", "chameleon"])
def test_documents_parse_back_to_the_samples(
    build, build_shards, image_tokenizer, text_tokenizer_path, sequence_format
):
    shards = build_shards(4)
    tokens = build(shards, sequence_format=sequence_format).write()
    spelling = tokens.build_format(TextTokenizer.load(text_tokenizer_path))
    samples = list(read_samples(shards))
    assert len(tokens) == len(samples) == 4
    for index, sample in enumerate(samples):
        assert tokens.keys[index] == f"{sample.key}#0"
        assert spelling.parse(tokens[index]) == expected_document(sample, image_tokenizer)


def test_parts_keep_their_order(build, build_shards, image_tokenizer, text_tokenizer_path, build_picture):
    parts = ("first", build_picture(30), "second", build_picture(31))
    shards = build_shards(0, extra=[Sample("a", parts), Sample("b", ("text only",)), Sample("c", (build_picture(32),))])
    tokens = build(shards).write()
    spelling = tokens.build_format(TextTokenizer.load(text_tokenizer_path))
    for index, sample in enumerate(read_samples(shards)):
        assert spelling.parse(tokens[index]) == expected_document(sample, image_tokenizer)


def test_manifest_counts_every_token(build, build_shards):
    tokens = build(build_shards(7)).write()
    ids = [tokens[index] for index in range(len(tokens))]
    counts = tokens.manifest["counts"]
    assert counts["documents"] == 7
    assert counts["tokens"] == sum(map(len, ids))
    assert counts["image_tokens"] == 7 * 4
    assert counts["tokens"] == counts["text_tokens"] + counts["image_tokens"] + 7 * 3  # <s>, <break> and </s>
    assert [entry["documents"] for entry in tokens.manifest["shards"]] == [3, 3, 1]
    assert all(array.dtype == np.int64 for array in ids)
    assert all(is_token_shard(tokens.folder, entry) for entry in tokens.manifest["shards"])


def test_every_picture_is_encoded_whatever_the_batch(build, build_shards, image_tokenizer, tmp_path):
    shards = build_shards(7)
    tokens = build(shards).write()
    expected = [tokens[index] for index in range(7)]
    assert image_tokenizer.num_encoded == 7
    for batch_size in (1, 3, 100):
        (tmp_path / "tokens").rename(tmp_path / f"before {batch_size}")
        tokens = build(shards, batch_size=batch_size).write()
        assert all(np.array_equal(tokens[index], expected[index]) for index in range(7))


def test_first_variant_is_the_plain_picture_and_others_are_changed(build, build_shards, tmp_path):
    shards = build_shards(5)
    plain = build(shards).write()
    plain = [plain[index] for index in range(5)]
    (tmp_path / "tokens").rename(tmp_path / "plain")
    tokens = build(shards, num_variants=3, augment=SHIFTS).write()
    assert tokens.num_variants == 3
    assert tokens.keys[:4] == ["0000#0", "0000#1", "0000#2", "0001#0"]
    assert all(np.array_equal(tokens[3 * index], plain[index]) for index in range(5))
    changed = [
        not np.array_equal(tokens[3 * index + variant], plain[index]) for index in range(5) for variant in (1, 2)
    ]
    assert sum(changed) >= 8
    assert any(not np.array_equal(tokens[3 * index + 1], tokens[3 * index + 2]) for index in range(5))


def test_a_variant_can_be_one_change_of_all_pictures(build, build_shards, build_picture, tmp_path):
    twice = [Sample(name, (name, build_picture(7))) for name in ("one", "other")]
    shards = build_shards(3, extra=twice)
    for alike in (True, False):
        tokens = build(shards, num_variants=6, augment=SHIFTS, change_alike=alike).write()
        (tmp_path / "tokens").rename(tmp_path / f"tokens {alike}")
        vocabulary = tokens.vocabulary
        codes = [ids[vocabulary.contains("image", ids)] for ids in (tokens[index] for index in range(18, 30))]
        same = [np.array_equal(codes[variant], codes[6 + variant]) for variant in range(6)]
        assert all(same) == alike
        assert same[0]
        assert len({ids.tobytes() for ids in codes[:6]}) > 2


def test_variants_follow_from_the_seed_alone(build, build_shards, tmp_path):
    shards = build_shards(5)
    results = []
    for number, options in enumerate(({}, {"batch_size": 100}, {"seed": 1})):
        tokens = build(shards, num_variants=2, augment=SHIFTS, **options).write()
        results.append(np.concatenate([tokens[index] for index in range(len(tokens))]))
        (tmp_path / "tokens").rename(tmp_path / f"run {number}")
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_bad_pictures_are_skipped_and_counted(build, build_shards, build_picture):
    whole = build_picture(50).data
    cut = Sample("cut", ("text", PictureFile(whole[: len(whole) // 2], "png", "cut")))
    tokens = build(build_shards(4, extra=[cut]), num_variants=2, augment=SHIFTS).write()
    assert tokens.manifest["counts"]["skipped"] == {"broken picture": 1}
    assert len(tokens) == 8
    large = build(build_shards(4, name="large"), limits=SampleLimits(max_pixels=63, max_skipped_share=0.5))
    large.config.out.rename(large.config.out.with_name("before"))
    with pytest.raises(TooManySkipped, match=r"00000\.tar:0000\.png: 8x8 pixels are more than the 63"):
        large.write()


def test_job_goes_on_where_it_was_broken_off(build, build_shards, image_tokenizer, monkeypatch):
    shards = build_shards(7)
    expected = build(shards).write()
    expected_ids = [expected[index] for index in range(7)]
    manifest = (expected.folder / MANIFEST_NAME).read_bytes()
    for path in expected.folder.iterdir():
        path.unlink()
    encode = type(image_tokenizer).encode
    image_tokenizer.num_encoded = 0

    def failing(self, images):
        if self.num_encoded >= 5:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(type(image_tokenizer), "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        build(shards).write()
    with pytest.raises(ValueError, match="holds no token shards; pretokenize again"):
        TokenShards.open(expected.folder)
    monkeypatch.setattr(type(image_tokenizer), "encode", encode)
    image_tokenizer.num_encoded = 0
    tokens = build(shards).write()
    assert image_tokenizer.num_encoded == 4  # the first shard of three is not encoded again
    assert (tokens.folder / MANIFEST_NAME).read_bytes() == manifest
    assert all(np.array_equal(tokens[index], expected_ids[index]) for index in range(7))


def test_changed_source_and_damaged_shard_are_encoded_again(build, build_shards, image_tokenizer, tmp_path):
    shards = build_shards(7)
    folder = build(shards).write().folder
    (shards / "00001.tar").write_bytes((build_shards(9, name="other") / "00002.tar").read_bytes())
    (shards / INDEX_NAME).unlink()
    (folder / "shard_00002.tokens.npy").write_bytes(b"")
    image_tokenizer.num_encoded = 0
    tokens = build(shards).write()
    assert image_tokenizer.num_encoded == 3 + 1
    assert list(tokens.keys) == [f"{number:04d}#0" for number in (0, 1, 2, 6, 7, 8, 6)]


def test_folder_of_other_settings_is_named(build, build_shards, tmp_path):
    shards = build_shards(1)
    build(shards).write()
    for options, key in (({"sequence_format": "chameleon"}, "sequence_format"), ({"num_sentinels": 5}, "digest")):
        with pytest.raises(ValueError, match=rf"shard_00000\.json: \w*{key} is .* remove it or choose another"):
            build(shards, **options).write()
    (tmp_path / "tokens" / "shard_00000.json").write_bytes(b'{"entry":')
    with pytest.raises(ValueError, match=r"shard_00000\.json is not JSON"):
        build(shards).write()


def test_share_of_bad_samples_fails_the_job_and_keeps_what_is_written(build, build_shards, tmp_path):
    shards = build_shards(6, extra=[Sample("bad", ("text", PictureFile(b"", "png", "x")))])
    with pytest.raises(TooManySkipped, match=r"1 of 7 samples are bad \(1 broken picture\).*00002\.tar:bad"):
        build(shards, limits=SampleLimits(max_skipped_share=0.1)).write()
    assert (tmp_path / "tokens" / "shard_00001.tokens.npy").is_file()
    assert not (tmp_path / "tokens" / MANIFEST_NAME).exists()
    assert len(build(shards, limits=SampleLimits(max_skipped_share=0.2)).write()) == 6


def test_token_shards_of_another_tokenizer_are_refused(build, build_shards, text_tokenizer_path, tmp_path):
    tokens = build(build_shards(1)).write()
    text_sha256 = TextTokenizer.load(text_tokenizer_path).sha256
    tokens.check(text_sha256, "0" * 64, tokens.vocabulary.digest)
    other = train_text_tokenizer(["something else"], tmp_path / "other.model", vocab_size=290).sha256
    for wrong, key in (
        ({"text_tokenizer_sha256": other}, "text_tokenizer_sha256"),
        ({"image_tokenizer_sha256": other}, "image_tokenizer_sha256"),
        ({"vocabulary_digest": other}, "vocabulary_digest"),
    ):
        with pytest.raises(ValueError, match=rf"manifest\.json: {key} is .* pretokenize again"):
            tokens.check(**wrong)


def test_damaged_token_shards_are_named(build, build_shards):
    folder = build(build_shards(4)).write().folder
    good = json.loads((folder / MANIFEST_NAME).read_bytes())
    entry = good["shards"][0]
    cases = [
        ({**good, "format_version": 99}, r"manifest\.json: format_version is 99"),
        (
            {key: good[key] for key in good if key != "counts"},
            r"manifest\.json: not the manifest .*the key counts is missing",
        ),
        ({**good, "vocabulary_digest": "f" * 64}, r"manifest\.json: vocabulary_digest is ffff"),
        ({**good, "shards": [{**entry, "documents": 2}]}, r"shard_00000\.offsets\.npy: 3 documents, not the 2"),
        ({**good, "shards": [{**entry, "tokens": 2}]}, r"shard_00000\.tokens\.npy: \d+ tokens, not the 2 of"),
        ({**good, "shards": [{**entry, "name": "shard_7"}]}, r"shard_7\.tokens\.npy: missing or broken"),
        ({**good, "vocabulary": {**good["vocabulary"], "num_sounds": 3}}, r"manifest\.json: .* 'num_sounds"),
        ({**good, "vocabulary": {**good["vocabulary"], "num_text_pieces": "x"}}, r"manifest\.json: not the manifest"),
        ({**good, "shards": None}, r"manifest\.json: not the manifest of token shards"),
        ({**good, "shards": [{"name": "shard_00000"}]}, r"manifest\.json: not the manifest of token shards"),
        ([], r"manifest\.json: not the manifest of token shards"),
    ]
    for manifest, message in cases:
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            TokenShards.open(folder)
    for section in (None, {"name": "emu", "grids": {}}, {**good["sequence_format"], "rows": 3}):
        (folder / MANIFEST_NAME).write_text(json.dumps({**good, "sequence_format": section}))
        with pytest.raises(ValueError, match=r"manifest\.json: sequence_format: .*; pretokenize again"):
            TokenShards.open(folder).build_format()
    (folder / MANIFEST_NAME).write_text(json.dumps(good))
    assert TokenShards.open(folder).keys[3] == "0003#0"
    offsets = np.load(folder / "shard_00000.offsets.npy")
    for wrong in (offsets[[0, 2, 1, 3]], offsets - [1, 0, 0, 0], offsets - [0, 0, 0, 1]):
        np.save(folder / "shard_00000.offsets.npy", wrong)
        with pytest.raises(ValueError, match=r"shard_00000\.tokens\.npy: the offsets beside it do not rise from 0"):
            TokenShards.open(folder)


@pytest.mark.parametrize("kind", ["tokens", "offsets", "keys", "key_offsets"])
def test_each_file_of_a_shard_is_compared_with_the_manifest(build, build_shards, image_tokenizer, kind):
    shards = build_shards(4)
    whole = build(shards).write()
    whole.verify()
    path = whole.folder / f"shard_00000.{kind}.npy"
    data = path.read_bytes()
    array = np.load(path)
    array[1] ^= 1
    np.save(path, array)
    entry = whole.manifest["shards"][0]
    assert not is_token_shard(whole.folder, entry)
    with pytest.raises(ValueError, match=rf"shard_00000\.{kind}\.npy: changed since it was written"):
        whole.verify()
    path.unlink()
    assert not is_token_shard(whole.folder, entry)
    with pytest.raises(ValueError, match=rf"shard_00000\.{kind}\.npy: missing or broken .* pretokenize again"):
        TokenShards.open(whole.folder)
    image_tokenizer.num_encoded = 0
    build(shards).write()
    assert image_tokenizer.num_encoded == 3  # the damaged shard alone
    assert path.read_bytes() == data


def test_number_of_keys_is_that_of_documents(build, build_shards):
    folder = build(build_shards(2)).write().folder
    np.save(folder / "shard_00000.key_offsets.npy", np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"shard_00000\.key_offsets\.npy: 1 documents, not the 2 of .*manifest\.json"):
        TokenShards.open(folder)


def test_folder_of_the_first_layout_is_named_and_written_again(build, build_shards):
    shards = build_shards(2)
    tokens = build(shards).write()
    record_path = tokens.folder / "shard_00000.json"
    record = json.loads(record_path.read_bytes())
    first = {**record["entry"], "sha256": record["entry"]["sha256"]["tokens"]}
    record_path.write_text(json.dumps({**record, "entry": first}))
    manifest = {**tokens.manifest, "format_version": 1, "shards": [first]}
    (tokens.folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: format_version is 1, .* reads 2; pretokenize again"):
        TokenShards.open(tokens.folder)
    assert build(shards).write().manifest == tokens.manifest


def test_index_outside_is_an_index_error(build, build_shards):
    tokens = build(build_shards(2)).write()
    for index in (-1, 2):
        with pytest.raises(IndexError, match="there are 2"):
            tokens[index]


def test_large_vocabularies_take_32_bits(build, build_shards, image_tokenizer):
    image_tokenizer.codebook_size = 70_000
    tokens = build(build_shards(2)).write()
    assert np.load(tokens.folder / "shard_00000.tokens.npy").dtype == np.uint32
    assert tokens[0].max() > 65_535


def test_settings_that_can_not_act_are_refused(build, build_shards):
    shards = build_shards(1)
    for options, message in (
        ({"num_variants": 2}, "augment changes nothing"),
        ({"augment": SHIFTS}, "num_variants is 1"),
        ({"change_alike": True}, "change_alike is set, but num_variants is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(shards, **options)


def test_progress_counts_shards(build, build_shards):
    seen = []
    build(build_shards(7)).write(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_saved_image_tokenizer_is_loaded_and_named_in_the_manifest(
    build_shards, text_tokenizer_path, tmp_path, save_image_tokenizer
):
    shards = build_shards(2)
    tokenizer = save_image_tokenizer(tmp_path / "image_tokenizer", 16)
    config = PretokenizeConfig(
        shards=(shards,), out=tmp_path / "tokens", text_tokenizer=text_tokenizer_path,
        image_tokenizer=tmp_path / "image_tokenizer",
    )  # fmt: skip
    tokens = pretokenize(config)
    assert tokens.manifest["image_tokenizer_sha256"] == ImageTokenizer.sha256(tmp_path / "image_tokenizer")
    sample = next(read_samples(shards))
    codes = tokenizer.eval().encode(to_tensor(resize_and_crop(sample.pictures[0].open(1000), 16))[None])[0]
    document = tokens.build_format(TextTokenizer.load(text_tokenizer_path)).parse(tokens[0])
    assert document == Document([Text("caption 0"), Image(codes.numpy())])
    with pytest.raises(ValueError, match="absent"):
        pretokenize(replace(config, image_tokenizer=tmp_path / "absent"))


def test_a_json_tokenizer_fills_as_many_rows_as_the_model_has(build_shards, tmp_path):
    """And a sentencepiece model has its own number."""
    letters = {chr(code): code - 0x20 for code in range(0x20, 0x7F)}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": letters, "merges": []}}))
    ImageTokenizer(
        ImageTokenizerConfig(
            image_size=16,
            autoencoder=AutoencoderConfig(channels=8, channel_multipliers=(1, 1), norm_groups=4, mid_blocks=()),
            quantizer=QuantizerConfig(kind="fsq", levels=(4, 4)),
        )
    ).save(tmp_path / "image")
    config = PretokenizeConfig(
        shards=(build_shards(2),), out=tmp_path / "tokens", text_tokenizer=path, image_tokenizer=tmp_path / "image",
        num_text_pieces=128,
    )  # fmt: skip
    tokens = pretokenize(config)
    assert tokens.vocabulary.config.num_text_pieces == 128
    parts = tokens.build_format(load_text_tokenizer(path, 128)).parse(tokens[0]).parts
    assert parts[0] == Text("caption 0")
    model = tmp_path / "text.model"
    train_text_tokenizer(["caption"], model, vocab_size=290)
    with pytest.raises(ValueError, match=r"num_text_pieces is 128, but .*text\.model is a sentencepiece model"):
        pretokenize(replace(config, text_tokenizer=model, out=tmp_path / "other"))

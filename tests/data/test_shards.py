"""Shards give back what was written, and every kind of damage is named and counted."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from mixmodal.data.shards import (
    INDEX_NAME,
    UNFINISHED_NAME,
    PictureFile,
    Sample,
    find_shards,
    mark_unfinished,
    read_samples,
    remove_unfinished,
    write_shards,
)
from mixmodal.data.skipping import SampleError, SampleLimits, SkipCounter, TooManySkipped


def picture(seed=0, size=8):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(stream, "PNG")
    return PictureFile(stream.getvalue(), "png", f"picture {seed}")


def pair(number):
    return Sample(f"{number:04d}", (f"caption {number}", picture(number)), {"concept": f"thing {number}"})


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(paths, max_share=1.0, **limits):
    counter = SkipCounter(max_share)
    return list(read_samples(paths, counter, SampleLimits(**limits))), counter


def content(sample):
    parts = [part if isinstance(part, str) else (part.data, part.suffix) for part in sample.parts]
    return sample.key, parts, dict(sample.metadata)


def test_pairs_come_back(tmp_path):
    samples = [pair(number) for number in range(5)]
    paths = write_shards(samples, tmp_path / "shards", shard_size=2)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [content(sample) for sample in read_samples(tmp_path / "shards")] == [content(sample) for sample in samples]
    assert [content(sample) for sample in read_samples(paths[1:])] == [content(sample) for sample in samples[2:]]


@pytest.mark.parametrize(
    "parts",
    [
        ("first", picture(1), "second", picture(2)),
        (picture(1), "behind"),
        (picture(1),),
        ("only text, with \u00e9 and <break>",),
        ("two", "texts", picture(3)),
    ],
)
def test_interleaved_documents_come_back(tmp_path, parts):
    sample = Sample("a", parts, {"style": "flat"})
    write_shards([sample], tmp_path)
    assert [content(sample) for sample in read_samples(tmp_path)] == [content(sample)]


def test_pairs_are_in_the_layout_of_img2dataset(tmp_path):
    (path,) = write_shards([pair(7)], tmp_path)
    with tarfile.open(path) as archive:
        assert sorted(archive.getnames()) == ["0007.json", "0007.png", "0007.txt"]
        assert archive.extractfile("0007.txt").read() == b"caption 7"


def test_shards_of_img2dataset_are_read(tmp_path):
    metadata = json.dumps({"caption": "from json", "url": "https://example.org/a.jpg", "status": "success"}).encode()
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    members = [("000000001.jpg", jpeg.getvalue()), ("000000001.json", metadata), ("000000001.txt", b"from txt\n")]
    write_tar(tmp_path / "00000.tar", [*members, ("000000002.JPG", jpeg.getvalue()), ("000000002.json", metadata)])
    first, second = read_samples(tmp_path)
    assert (first.texts, second.texts) == (["from txt"], ["from json"])
    assert first.metadata["status"] == "success"
    assert second.pictures[0].open(100).size == (8, 8)


def test_equal_samples_give_equal_files(tmp_path):
    (first,), (second,) = write_shards([pair(1)], tmp_path / "a"), write_shards([pair(1)], tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_folder_with_shards_is_not_written_into(tmp_path):
    write_shards([pair(1)], tmp_path)
    with pytest.raises(ValueError, match="holds shards already"):
        write_shards([pair(2)], tmp_path)


def test_what_was_read_before_a_failure_is_kept(tmp_path):
    def failing():
        yield from map(pair, range(5))
        raise TooManySkipped("enough")

    with pytest.raises(TooManySkipped):
        write_shards(failing(), tmp_path, shard_size=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [UNFINISHED_NAME, "00000.tar", "00001.tar", "00002.tar"]
    assert [sample.key for sample in read_samples(tmp_path)] == ["0000", "0001", "0002", "0003", "0004"]


def test_full_disk_leaves_no_half_shard(tmp_path):
    def failing():
        yield pair(0)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write_shards(failing(), tmp_path)
    assert caught.value.filename == str(tmp_path / "00000.tar")
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED_NAME]


def test_only_marked_shards_are_removed(tmp_path):
    (path,) = write_shards([pair(1)], tmp_path)
    assert not (tmp_path / UNFINISHED_NAME).exists()
    remove_unfinished(tmp_path)  # finished: left alone
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(ValueError, match=r"holds 00000\.tar and neither shards\.json nor \.unfinished"):
        remove_unfinished(tmp_path)
    assert path.is_file()
    mark_unfinished(tmp_path)
    remove_unfinished(tmp_path)
    assert not path.exists()
    write_shards([pair(2)], tmp_path)
    assert [sample.key for sample in read_samples(tmp_path)] == ["0002"]


def test_broken_shard_that_ends_the_job_is_counted_once(tmp_path):
    """Once, and the message is the counter's own."""
    broken = write_tar(tmp_path / "00000.tar", [("a.txt", bytes(5000))])
    broken.write_bytes(broken.read_bytes()[:2000])
    counter = SkipCounter(max_share=0.0, min_samples=1)
    with pytest.raises(TooManySkipped) as caught:
        list(read_samples(broken, counter))
    assert counter.skipped == {"broken shard": 1}
    assert str(caught.value).startswith("1 of 1 samples are bad (1 broken shard)")
    assert "BufferedReader" not in str(caught.value)


def test_unsafe_name_that_ends_the_job_is_counted_once(tmp_path):
    path = write_tar(tmp_path / "00000.tar", [("../up.txt", b"text")])
    counter = SkipCounter(max_share=0.0, min_samples=1)
    with pytest.raises(TooManySkipped, match=r"1 of 1 samples are bad \(1 unsafe name\)"):
        list(read_samples(path, counter))
    assert counter.skipped == {"unsafe name": 1}


@pytest.mark.parametrize("key", ["../up", "a.b", "", "a/b", "x" * 81])
def test_keys_that_can_not_be_members_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="a key to write has"):
        write_shards([Sample(key, ("text",))], tmp_path)


def test_equal_keys_in_a_shard_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'0001' comes twice"):
        write_shards([pair(1), pair(1)], tmp_path)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="absent: there are no shards"):
        find_shards(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no \*\.tar"):
        find_shards(tmp_path)


def test_every_cut_through_a_shard_is_noticed(tmp_path):
    """However many bytes are left, what is read is a true beginning and the damage is counted once."""
    (path,) = write_shards([pair(number) for number in range(3)], tmp_path / "whole")
    data, whole = path.read_bytes(), [content(sample) for sample in read_samples(path)]
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "cut").mkdir()
    for size in (1, 300, 512, 700, *range(1024, end + 512, 512)):
        broken = tmp_path / "cut" / "00000.tar"
        broken.write_bytes(data[:size])
        samples, counter = read(broken)
        assert counter.skipped["broken shard"] == 1, size
        assert "cut/00000.tar" in counter.examples[-1] or "cut/00000.tar" in counter.examples[0]
        assert all(sample.key in ("0000", "0001", "0002") for sample in samples)
        assert [content(sample) for sample in samples[:-1]] == whole[: max(len(samples) - 1, 0)]


def test_other_shards_are_read_behind_a_truncated_one(tmp_path):
    paths = write_shards([pair(number) for number in range(6)], tmp_path, shard_size=2)
    paths[1].write_bytes(paths[1].read_bytes()[:700])
    (tmp_path / INDEX_NAME).unlink()
    samples, counter = read(tmp_path)
    assert [sample.key for sample in samples] == ["0000", "0001", "0004", "0005"]
    assert counter.skipped == {"broken shard": 1, "no picture": 1}  # the archive, and the sample cut in two


def test_index_tells_how_many_samples_are_lost(tmp_path):
    paths = write_shards([pair(number) for number in range(6)], tmp_path, shard_size=3)
    write_tar(paths[0], [("0000.png", picture().data), ("0000.txt", b"text")])
    samples, counter = read(tmp_path)
    assert len(samples) == 4
    assert counter.skipped == {"lost sample": 2}
    for broken, message in (
        (b'{"shards"', "shards.json is not JSON"),
        (b'{"shards": [1]}', "shards.json: it lists no"),
    ):
        (tmp_path / INDEX_NAME).write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"hello" * 500)
    samples, counter = read(tmp_path)
    assert not samples
    assert counter.skipped == {"broken shard": 1}


@pytest.mark.parametrize("name", ["../../etc/cron.png", "/etc/cron.png", "a/../../b.png", "..\\b.png", "C:\\b.png"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    text = name.rsplit(".", 1)[0] + ".txt"
    good = [("good.png", picture().data), ("good.txt", b"fine")]
    write_tar(tmp_path / "00000.tar", [(name, picture().data), (text, b"bad"), *good])
    samples, counter = read(tmp_path)
    assert [sample.key for sample in samples] == ["good"]
    assert counter.skipped == {"unsafe name": 1}
    assert "leads out of the folder" in counter.examples[0]
    assert "00000.tar" in counter.examples[0]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k.txt", b"a caption")], "no picture"),
        ([("k.png", b""), ("k.jpg", b""), ("k.txt", b"a caption")], "no picture"),
        ([("k.png", b"")], "no caption"),
        ([("k.png", b""), ("k.txt", b" \n")], "empty text"),
        ([("k.png", b""), ("k.txt", b"\xff\xfe")], "broken text"),
        ([("k.png", b""), ("k.json", b'{"caption": "a\\ud800"}')], "broken text"),
        ([("k.png", b""), ("k.txt", b"fine"), ("k.json", b"{")], "broken metadata"),
        ([("k.png", b""), ("k.txt", b"fine"), ("k.json", b"[]")], "broken metadata"),
        ([("k.json", b'{"parts": []}')], "empty document"),
        ([("k.json", b'{"parts": [{"text": ""}]}')], "empty text"),
        ([("k.json", b'{"parts": [{"image": "0.png"}]}')], "no picture"),
        ([("k.json", b'{"parts": [{"image": "__key__"}]}')], "broken metadata"),
        ([("k.json", b'{"parts": [{"image": "../../x.png"}]}')], "no picture"),
        ([("k.json", b'{"parts": [{"sound": "0.wav"}]}')], "broken metadata"),
        ([("k.json", b'{"parts": ["text"]}')], "broken metadata"),
    ],
)
def test_unusable_sample_is_counted_by_its_reason(tmp_path, members, reason):
    path = write_tar(tmp_path / "00000.tar", [*members, ("last.json", b'{"parts": [{"text": "fine"}]}')])
    samples, counter = read(tmp_path)
    assert [sample.key for sample in samples] == ["last"]
    assert counter.skipped == {reason: 1}
    assert f"{path}:k: " in counter.examples[0]
    with pytest.raises(TooManySkipped, match=f"{path}:k: "):
        list(read_samples(tmp_path))


def test_long_caption_is_cut_and_counted(tmp_path):
    caption = "word  " * 10_000
    write_tar(tmp_path / "00000.tar", [("k.png", picture().data), ("k.txt", caption.encode())])
    (sample,), counter = read(tmp_path, max_caption_words=3)
    assert sample.texts == ["word  word  word"]
    assert counter.altered == {"truncated text": 1}
    assert counter.num_skipped == 0
    (sample,), counter = read(tmp_path, max_caption_words=10_000)
    assert sample.texts == [caption.strip()]
    assert not counter.altered


def test_duplicate_member_is_counted(tmp_path):
    write_tar(tmp_path / "00000.tar", [("k.png", picture().data), ("k.txt", b"one"), ("k.txt", b"two")])
    samples, counter = read(tmp_path)
    assert [sample.texts for sample in samples] == [["one"]]
    assert counter.skipped == {"broken shard": 1}


def test_links_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        link = tarfile.TarInfo("k.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    write_tar(tmp_path / "00001.tar", [("k.png", picture().data), ("k.txt", b"fine")])
    samples, _ = read(tmp_path)
    assert [sample.texts for sample in samples] == [["fine"]]


def test_share_of_bad_samples_ends_the_job():
    counter = SkipCounter(max_share=0.1, min_samples=20)
    counter.use(10)
    for _ in range(9):
        counter.skip(SampleError("bad", "a.tar:k: broken"))
    with pytest.raises(TooManySkipped, match=r"10 of 20 samples are bad \(10 bad\).*a\.tar:k: broken"):
        counter.skip(SampleError("bad", "a.tar:k: broken"))


def test_few_bad_samples_are_put_up_with():
    counter = SkipCounter(max_share=0.1)
    counter.skip(SampleError("bad", "first"))
    counter.use(9)
    counter.finish()
    counter.skip(SampleError("bad", "second"))
    with pytest.raises(TooManySkipped):
        counter.finish()
    assert counter.to_dict() == {
        "used": 9,
        "skipped": {"bad": 2},
        "altered": {},
        "examples": ["skipped (bad): first", "skipped (bad): second"],
    }


@pytest.mark.parametrize("limits", [{"max_skipped_share": 1.5}, {"max_pixels": 0}, {"max_caption_words": 0}])
def test_limits_out_of_range_are_named(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        SampleLimits(**limits)

"""Sound in files: in an mp4 beside the frames, and as it is in a wav file; decoded again by ffmpeg."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import heard

from disagg_ray.media.sound import Sound, read_wav
from disagg_ray.media.video import encode


@pytest.mark.parametrize("seconds", [0.1, 1.0, 2.37])
def test_an_mp4_holds_the_sound(seconds: float, tmp_path: Path) -> None:
    times = np.arange(int(24000 * seconds)) / 24000
    tones = np.sin(2 * np.pi * np.stack([440 * times, 1000 * times])).astype(np.float32) / 2
    frames = np.random.default_rng(0).random((round(24 * seconds), 32, 32, 3), np.float32)
    data = encode(frames, 24, "mp4", sound=Sound(tones, 24000))
    assert data == encode(frames, 24, "mp4", sound=Sound(tones, 24000))
    found = heard(data, tmp_path)
    assert found.samples.shape[0] == 2 and found.rate == 24000
    assert found.seconds == pytest.approx(seconds, abs=0.1)
    same = min(tones.shape[1], found.samples.shape[1])
    assert np.abs(found.samples[:, :same] - tones[:, :same]).mean() < 0.05
    assert len(iio.imread(data, plugin="FFMPEG", extension=".mp4")) == len(frames)


def test_a_wav_holds_samples_as_they_are(tmp_path: Path) -> None:
    sound = Sound(np.random.default_rng(0).uniform(-1, 1, (2, 1001)).astype(np.float32), 24000)
    assert np.array_equal(read_wav(sound.to_wav()).samples, sound.samples)
    assert np.array_equal(heard(sound.to_wav(), tmp_path).samples, sound.samples), "as ffmpeg reads it"

"""One telephone call: read the distributions, draw a channel for an utterance, send the utterance through it.

`draw` is a function of (seed, key, epoch) alone and `apply` of its plan and the samples alone, so that any number
of workers, any order, offline preparation and training online give the same audio. A plan is plain JSON, kept in
the row's `channel` field. The order is the physical one: noise and room at the mouth, send response, level,
limiter, hop 1 with packet loss, hop 2, line noise, hum, echo, G.711, recorder, up-sampler.

    config = load_config("conf/telephone_channel.yaml")
    plan = draw(config, seed=0, key="utt1")
    samples_16k = apply(config, plan, samples, 16000, 16000, babble=babble_source(pool))
"""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import yaml

from common import UserError
from telephone import filters, packet_loss
from telephone import noise as sounds
from telephone.codecs import CODECS, fitted, from_pcm, g711, to_pcm
from telephone.resample import resample, resample_counted

TELEPHONE_FS = 8000
CODED = ("amr_nb", "gsm_fr", "opus_nb", "g726")
# What the YAML may hold: `probability`; the names that may have shares; or the bounds of a range.
SCHEMA: dict[str, str | tuple] = {
    "noise.probability": "probability",
    "noise.kind": ("babble", "pink", "white", "file"),
    "noise.own_file_probability": "probability",
    "noise.snr_db": (-20.0, 80.0),
    "room.probability": "probability",
    "room.rt60_s": (0.05, 2.0),
    "room.direct_db": (-10.0, 30.0),
    "level.active_dbov": (-60.0, -5.0),
    "send.shape": ("mobile", "modified_irs", "irs", "g712", "band"),
    "send.low_hz": (20.0, 1000.0),
    "send.high_hz": (2000.0, 3990.0),
    "send.peak_count": ("0", "1", "2", "3"),
    "send.peak_hz": (100.0, 3900.0),
    "send.peak_db": (-20.0, 20.0),
    "limiter.kind": ("none", "agc", "hard_clip", "soft_clip"),
    "limiter.drive_dbov": (-30.0, 6.0),
    "limiter.agc_target_dbov": (-40.0, -10.0),
    "hop1.codec": ("g711", "g722", *CODED, "none"),
    "hop1.amr_kbps": ("12.2", "10.2", "7.95", "7.4", "6.7", "5.9", "5.15", "4.75"),
    "hop1.amr_dtx_probability": "probability",
    "hop1.opus_kbps": ("6", "8", "12", "16", "24"),
    "hop1.g726_kbps": ("24", "32", "40"),
    "packet_loss.probability": "probability",
    "packet_loss.preset": ("0.5/1.1", "1/1.5", "3/2", "5/2.5", "10/3"),
    "hop2.codec": (*CODED, "none"),
    "line.noise_probability": "probability",
    "line.noise_kind": ("white", "pink"),
    "line.noise_dbm0": (-90.0, -20.0),
    "line.hum_probability": "probability",
    "line.hum_dbm0": (-90.0, -20.0),
    "line.echo_probability": "probability",
    "line.echo_loss_db": (5.0, 90.0),
    "line.echo_delay_ms": (1.0, 500.0),
    "g711.law": ("alaw", "ulaw", "none"),
    "recorder.codec": ("none", "gsm_fr", "mp3", "g726"),
    "recorder.mp3_kbps": ("8", "16", "24", "32"),
}
# One fixed place per value in the row of uniform numbers: narrowing one value leaves every other one as it was.
PLACES = {name: place for place, name in enumerate(SCHEMA)}
DRAWS = len(SCHEMA) + 6  # and frequency and gain of three peaks
CODEC_TYPES = {
    "a-law": {"hop1": {"codec": {"g711": 1}}, "g711": {"law": {"alaw": 1}}},
    "mu-law": {"hop1": {"codec": {"g711": 1}}, "g711": {"law": {"ulaw": 1}}},
    "gsm": {"hop1": {"codec": {"gsm_fr": 1}}},
    "amr-nb": {"hop1": {"codec": {"amr_nb": 1}}},
    "opus": {"hop1": {"codec": {"opus_nb": 1}}},
    "g726": {"hop1": {"codec": {"g726": 1}}},
    "g722": {"hop1": {"codec": {"g722": 1}}},
    "mp3": {"recorder": {"codec": {"mp3": 1}}},
}
NO_NOISE = {"noise": {"probability": 0}, "line": {"noise_probability": 0, "hum_probability": 0, "echo_probability": 0}}
NO_CODEC = {
    "hop1": {"codec": {"none": 1}}, "hop2": {"codec": {"none": 1}}, "g711": {"law": {"none": 1}},
    "recorder": {"codec": {"none": 1}}, "packet_loss": {"probability": 0},
}  # fmt: skip


def load_config(
    path: str | Path,
    preset: str | None = None,
    codec_type: str | None = None,
    low_freq: float | None = None,
    high_freq: float | None = None,
    snr_db_min: float | None = None,
    snr_db_max: float | None = None,
    no_noise: bool = False,
    no_codec: bool = False,
    own_noise: bool = False,
    no_babble: bool = False,
) -> dict[str, Any]:
    """Read and check the distributions, narrowed by what the arguments say; a mistake is a UserError, code 2."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file: {error}", code=2) from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: no sections; take conf/telephone_channel.yaml as a pattern", code=2)
    presets = config.pop("presets", None) or {}
    _check(config, path)
    if preset is not None:
        if preset not in presets:
            raise UserError(f"{path}: no preset {preset}; it has {', '.join(presets) or 'none'}", code=2)
        config = _merged(config, presets[preset])
    if codec_type is not None:
        if codec_type not in CODEC_TYPES:
            raise UserError(f"no codec type {codec_type}; there are {', '.join(CODEC_TYPES)}", code=2)
        config = _merged(config, CODEC_TYPES[codec_type])
    if low_freq is not None or high_freq is not None:
        edges = {"low_hz": low_freq, "high_hz": high_freq}
        edges = {name: [hz, hz] for name, hz in edges.items() if hz is not None}
        config = _merged(config, {"send": {"shape": {"band": 1}, "peak_count": {"0": 1}, **edges}})
    if snr_db_min is not None or snr_db_max is not None:
        config["noise"]["snr_db"] = _narrowed(config["noise"]["snr_db"], snr_db_min, snr_db_max)
    for wanted, change in ((no_noise, NO_NOISE), (no_codec, NO_CODEC)):
        config = _merged(config, change) if wanted else config
    _check(config, path)
    kind = config["noise"]["kind"]
    if no_babble:  # a corpus of one utterance has no other voices
        kind["pink"] = kind.get("pink", 0) + kind.pop("babble", 0)
    if own_noise:
        share = config["noise"]["own_file_probability"]
        config["noise"]["kind"] = {name: value * (1 - share) for name, value in kind.items()} | {"file": share}
    return config


def draw(config: dict[str, Any], seed: int, key: str, epoch: int | None = None) -> dict[str, Any]:
    """Draw the channel of one utterance: a plain JSON plan, a function of (seed, key, epoch) alone."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{epoch}".encode("utf-8", "surrogatepass")).digest()
    number = int.from_bytes(digest[:6], "big")
    uniform = np.random.default_rng(number).random(DRAWS)

    def value(name: str) -> Any:
        section, item = name.split(".")
        return _quantile(SCHEMA[name], config[section][item], float(uniform[PLACES[name]]))

    plan: dict[str, Any] = {"seed": seed, "epoch": epoch, "draw": number}
    if value("noise.probability"):
        plan["noise"] = {"kind": value("noise.kind"), "snr_db": value("noise.snr_db")}
    if value("room.probability"):
        plan["room"] = {"rt60_s": value("room.rt60_s"), "direct_db": value("room.direct_db")}
    shape = value("send.shape")
    plan["send"] = {"shape": shape}
    if shape == "band":
        plan["send"] |= {"low_hz": value("send.low_hz"), "high_hz": value("send.high_hz")}
    elif count := int(value("send.peak_count")):
        spare = [float(u) for u in uniform[len(SCHEMA) :]]
        plan["send"]["peaks"] = [
            [_quantile((), config["send"]["peak_hz"], spare[i]), _quantile((), config["send"]["peak_db"], spare[3 + i])]
            for i in range(count)
        ]
    plan["active_dbov"] = value("level.active_dbov")
    limiter = value("limiter.kind")
    if limiter == "agc":
        plan["limiter"] = {"kind": limiter, "target_dbov": value("limiter.agc_target_dbov")}
    elif limiter != "none":
        plan["limiter"] = {"kind": limiter}
        plan["active_dbov"] = value("limiter.drive_dbov")
    law = value("g711.law")
    for hop in ("hop1", "hop2", "recorder"):
        if (codec := value(f"{hop}.codec")) != "none":
            codec = f"g711_{'alaw' if law == 'none' else law}" if codec == "g711" else codec
            plan[hop] = {"codec": codec, **_setting(codec, value)}
    if "hop1" in plan and value("packet_loss.probability"):
        percent, burst = value("packet_loss.preset").split("/")
        plan["packet_loss"] = {"percent": float(percent), "burst": float(burst)}
    plan["line"] = {}
    if value("line.noise_probability"):
        plan["line"] |= {"noise": value("line.noise_kind"), "noise_dbm0": value("line.noise_dbm0")}
    if value("line.hum_probability"):
        plan["line"]["hum_dbm0"] = value("line.hum_dbm0")
    if value("line.echo_probability"):
        plan["line"] |= {"echo_ms": value("line.echo_delay_ms"), "echo_loss_db": value("line.echo_loss_db")}
    plan["g711"] = law
    return plan


def apply(
    config: dict[str, Any],
    plan: dict[str, Any],
    samples: np.ndarray,
    fs: int,
    output_fs: int,
    babble: sounds.Source | None = None,
    noise: sounds.Source | None = None,
) -> np.ndarray:
    """Send float samples at `fs` through the channel of `plan`; return float32 at `output_fs` on the 16-bit grid.

    Adds to the plan what came of it: `measured` (level, packets lost, overshoots of the up-sampler) and the
    keys of babble or noise files used. `babble` and `noise` give such noise (telephone.noise).
    """
    return from_pcm(apply_pcm(config, plan, samples, fs, output_fs, babble, noise))


def apply_pcm(
    config: dict[str, Any],
    plan: dict[str, Any],
    samples: np.ndarray,
    fs: int,
    output_fs: int,
    babble: sounds.Source | None = None,
    noise: sounds.Source | None = None,
) -> np.ndarray:
    """As `apply`, but int16 samples, to be written to a file."""
    # Only a wideband first hop needs more than the telephone band; every step before it is linear.
    working_fs = CODECS[plan["hop1"]["codec"]].fs if "hop1" in plan else TELEPHONE_FS
    count = round(samples.size * TELEPHONE_FS / fs)
    measured: dict[str, Any] = {}
    speech = _mouth_to_line(plan, resample(samples, fs, working_fs), working_fs, babble, noise, measured)
    speech = speech + sounds.converter(_generator(plan, 6), speech.size)
    speech = _first_hop(plan, speech, count, measured)
    if "hop2" in plan:
        speech = _coded(speech, plan["hop2"])
    speech = _line(plan, speech)
    if plan["g711"] != "none":
        speech = from_pcm(g711(to_pcm(speech), plan["g711"]))
    if "recorder" in plan:
        speech = _coded(speech, plan["recorder"])
    out, measured["overshoots"] = resample_counted(speech, TELEPHONE_FS, output_fs)
    plan["measured"] = measured
    return to_pcm(fitted(out, round(samples.size * output_fs / fs)))


def _generator(plan: dict[str, Any], place: int) -> np.random.Generator:
    """Every source of noise has its own generator, so that leaving one out changes no other."""
    return np.random.default_rng([plan["draw"], place])


def _mouth_to_line(
    plan: dict, speech: np.ndarray, fs: int, babble: sounds.Source | None, noise: sounds.Source | None, measured: dict
) -> np.ndarray:
    """Room, send response, noise, level and limiter. Level and SNR are those of the line, after the send response."""
    if "room" in plan:
        speech = filters.room(_generator(plan, 1), speech, fs, **plan["room"])
    speech = _send(plan, speech, fs)
    active = sounds.active_level(speech, fs)
    measured["sent_dbov"] = round(active, 2) if active > sounds.SILENT_DBOV else None
    if active > sounds.SILENT_DBOV:
        speech = speech * np.float32(sounds.db_to_gain(plan["active_dbov"] - active))
    if "noise" in plan:
        around = _around(plan["noise"], _generator(plan, 2), speech.size, fs, {"babble": babble, "file": noise})
        speech = speech + sounds.at_level(_send(plan, around, fs), plan["active_dbov"] - plan["noise"]["snr_db"])
    if "limiter" not in plan:
        return speech
    if plan["limiter"]["kind"] == "agc":
        return filters.agc(speech, fs, plan["limiter"]["target_dbov"])
    return filters.limit(speech, plan["limiter"]["kind"])


def _send(plan: dict, samples: np.ndarray, fs: int) -> np.ndarray:
    response = plan["send"]
    edges = response.get("low_hz", 0.0), response.get("high_hz", 0.0)
    return filters.send(samples, fs, response["shape"], *edges, response.get("peaks"))


def _around(drawn: dict, rng: np.random.Generator, count: int, fs: int, sources: dict) -> np.ndarray:
    """Noise around the talker; what recordings it is made of goes into the plan."""
    if drawn["kind"] in ("white", "pink"):
        return sounds.coloured(rng, drawn["kind"], count, fs)
    source = sources[drawn["kind"]]
    if source is None:
        raise ValueError(f"the channel has {drawn['kind']} noise, but no source of it was given to apply()")
    samples, drawn["sources"] = source(rng, count, fs)
    return samples


def _first_hop(plan: dict, speech: np.ndarray, count: int, measured: dict) -> np.ndarray:
    """Hop 1 and the packets it loses: inside the stream of AMR-NB, concealed on decoded speech for the others."""
    if "hop1" not in plan:
        return speech
    codec, lost = CODECS[plan["hop1"]["codec"]], None
    if "packet_loss" in plan:
        packets = -(-count // packet_loss.PACKET)
        rate, burst = plan["packet_loss"]["percent"] / 100, plan["packet_loss"]["burst"]
        lost = packet_loss.lost_packets(_generator(plan, 3), packets, rate, burst)
        measured["packets"], measured["packets_lost"] = packets, int(lost.sum())
    speech = _coded(speech, plan["hop1"], lost if codec.loses else None)
    speech = fitted(resample(speech, codec.fs, TELEPHONE_FS), count)
    return speech if lost is None or codec.loses else packet_loss.conceal(speech, lost, packet_loss.PACKET)


def _coded(speech: np.ndarray, hop: dict, lost: np.ndarray | None = None) -> np.ndarray:
    codec = CODECS[hop["codec"]]
    settings = {name: hop[name] for name in ("kbps", "dtx") if name in hop}
    if codec.loses:
        settings["lost"] = lost
    return from_pcm(fitted(codec.code(to_pcm(speech), **settings), speech.size))


def _line(plan: dict, speech: np.ndarray) -> np.ndarray:
    line = plan["line"]
    if "echo_ms" in line:
        speech = filters.echo(speech, TELEPHONE_FS, line["echo_ms"], line["echo_loss_db"])
    if "hum_dbm0" in line:
        level = line["hum_dbm0"] - sounds.DBM0
        speech = speech + sounds.at_level(sounds.hum(_generator(plan, 4), speech.size, TELEPHONE_FS), level)
    if "noise" in line:
        hiss = sounds.coloured(_generator(plan, 5), line["noise"], speech.size, TELEPHONE_FS)
        speech = speech + sounds.at_level(hiss, line["noise_dbm0"] - sounds.DBM0)
    return speech


def _setting(codec: str, value: Any) -> dict[str, Any]:
    """The bit rate of a codec that has several."""
    if codec == "amr_nb":
        return {"kbps": float(value("hop1.amr_kbps")), "dtx": value("hop1.amr_dtx_probability")}
    names = {"opus_nb": "hop1.opus_kbps", "g726": "hop1.g726_kbps", "mp3": "recorder.mp3_kbps"}
    return {"kbps": float(value(names[codec]))} if codec in names else {}


def _quantile(kind: str | tuple, given: Any, uniform: float) -> Any:
    """The value of a distribution at `uniform` in [0, 1)."""
    if kind == "probability":
        return uniform < given
    if kind and isinstance(kind[0], str):
        # In the schema's order, so that rearranging the YAML changes nothing.
        total = 0.0
        for name in kind:
            total += given.get(name, 0)
            if uniform < total:
                return name
        return max(given, key=given.get)
    if isinstance(given, dict):
        normal = NormalDist(given["mean"], max(given["std"], 1e-9)).inv_cdf(min(max(uniform, 1e-9), 1 - 1e-9))
        return round(min(max(normal, given["min"]), given["max"]), 3)
    return round(given[0] + uniform * (given[1] - given[0]), 3)


def _merged(config: dict, changes: dict) -> dict:
    """The sections of `changes` over `config`, value by value; an unknown one is left for _check to name."""
    merged = copy.deepcopy(config)
    for section, items in changes.items():
        merged[section] = {**merged.get(section, {}), **items} if isinstance(items, dict) else items
    return merged


def _narrowed(given: Any, low: float | None, high: float | None) -> Any:
    """A range held within low..high; where a normal distribution would lie outside, its mean moves inside."""
    if isinstance(given, dict):
        narrowed = dict(given)
        narrowed["min"] = given["min"] if low is None else low
        narrowed["max"] = given["max"] if high is None else high
        if not narrowed["min"] <= given["mean"] <= narrowed["max"]:
            narrowed["mean"] = (narrowed["min"] + narrowed["max"]) / 2
        return narrowed
    return [given[0] if low is None else low, given[1] if high is None else high]


def _check(config: dict[str, Any], path: str | Path) -> None:
    def wrong(name: str, what: str) -> UserError:
        return UserError(f"{path}: {name}: {what}", code=2)

    known = {name.split(".")[0] for name in SCHEMA}
    for section, items in config.items():
        if section not in known:
            raise wrong(str(section), f"unknown section; there are {', '.join(sorted(known))}")
        if not isinstance(items, dict):
            raise wrong(section, "not a section with values")
        for item in items:
            if f"{section}.{item}" not in SCHEMA:
                raise wrong(f"{section}.{item}", "unknown key")
    for name, kind in SCHEMA.items():
        section, item = name.split(".")
        if item not in config.get(section, {}):
            raise wrong(name, "missing")
        problem = _problem(kind, config[section][item])
        if problem:
            raise wrong(name, problem)


def _problem(kind: str | tuple, given: Any) -> str | None:
    """What is wrong with a value, or None."""
    if kind == "probability":
        return None if _number(given) and 0 <= given <= 1 else f"{given} is not a probability from 0 to 1"
    if isinstance(kind[0], str):
        if not isinstance(given, dict) or not given:
            return "not a list of name: share"
        unknown = [str(name) for name in given if name not in kind]
        if unknown:
            return f"unknown {unknown[0]}; there are {', '.join(kind)}"
        if not all(_number(share) and share >= 0 for share in given.values()):
            return "a share is not a number from 0 to 1"
        total = sum(given.values())
        return None if abs(total - 1) < 1e-6 else f"the shares sum to {total:g}, not to 1"
    if isinstance(given, dict):
        if set(given) != {"mean", "std", "min", "max"} or not all(_number(v) for v in given.values()):
            return "a normal distribution has numbers for mean, std, min and max"
        low, high = given["min"], given["max"]
        if given["std"] < 0 or not low <= given["mean"] <= high:
            return f"mean {given['mean']} is not within min {low} and max {high}, or std is negative"
    elif isinstance(given, list) and len(given) == 2 and all(_number(v) for v in given):
        low, high = given
    else:
        return "neither [from, to] nor {mean, std, min, max}"
    if low > high:
        return f"min {low} is above max {high}"
    return None if kind[0] <= low and high <= kind[1] else f"{low}..{high} is outside {kind[0]:g}..{kind[1]:g}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

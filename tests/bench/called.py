"""The rival of far.py called into a run, for tests: a catalogue with it, a subject whose weights it claims to have."""

import json
import sys
from pathlib import Path

import torch

from kvfold.bench.peers.catalog import Peer, PeerMethod
from kvfold.bench.peers.rivals import Rivals
from kvfold.bench.subject import Subject

FAR = Path(__file__).with_name("far.py")
METHODS = ("Honest", "Crash", "Hang", "Rubbish", "Odd", "Refuse", "LateCrash")


class Logged(Peer):
    """A rival that writes what it is asked to a file."""

    def command(self):
        return (*Peer.command(self), str(self.log))


def subject():
    model = torch.nn.Linear(2, 2)
    model.name_or_path = "a folder"
    return Subject(name="far", model=model, tokenizer=None, fingerprint="f00d", dtype="float32", device="cpu")


def rivals(monkeypatch, log, *, weights=None, limit_seconds=60.0, one=None):
    one = one or subject()
    each = [weight.detach().double().abs() for weight in one.model.parameters()]
    total = [sum(weight.numel() for weight in each), sum(float(weight.sum()) for weight in each)]
    monkeypatch.setenv("FAR_WEIGHTS", json.dumps(weights or total))
    kind = type("FarPeer", (Logged,), {"log": log})
    methods = {name: PeerMethod(sized=False) for name in METHODS}
    far = kind(name="far", program=FAR, python=Path(sys.executable), methods=methods)
    return Rivals(subject=one, threads=1, peers={"far": far}, limit_seconds=limit_seconds)


def asked(log):
    """The verbs of all requests so far, in order."""
    return [json.loads(line)["do"] for line in log.read_text().splitlines()]

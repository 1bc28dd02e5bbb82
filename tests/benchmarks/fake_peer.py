"""A framework that only speaks: `python fake_peer.py BEHAVIOUR`."""

import json
import sys


def say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(behaviour: str) -> None:
    sys.stderr.write("a framework's own words\n")
    if behaviour == "dies":
        raise SystemExit("no module named flwr")
    say({"ready": {"fake": "1.0"}})
    for line in sys.stdin:
        match json.loads(line)["ask"], behaviour:
            case "round", "fails":
                answer: dict[str, object] = {"error": "ValueError: a client failed\nand more"}
            case "round", "lazy":
                answer = {"examples": 50}
            case "round", _:
                answer = {"examples": 100}
            case "accuracy", _:
                answer = {"accuracy": 0.5 if behaviour == "dull" else 0.95}
            case _:
                return
        say(answer)


if __name__ == "__main__":
    main(sys.argv[1])

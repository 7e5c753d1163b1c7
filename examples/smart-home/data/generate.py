"""Generate the train, validation and test rows of the three tasks from the templates in source/*.txt.

Run it again after you edit the templates or the words below: `python examples/smart-home/data/generate.py`. The same
templates give the same files. Test data is kept out of training: a template with its values is in one split only, half
of the validation and test rows come from templates that training never sees, and some pairs of service and area
(HELD_BACK) are not in the training rows.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {
    "command": {"train": 600, "validation": 100, "test": 100},
    "intent": {"train": 600, "validation": 100, "test": 100},
    "reply": {"train": 400, "validation": 60, "test": 60},
}
SHARE_OF_TYPOS = 0.04
Row = dict[str, object]

# Plain name -> how people say it. The first form is the usual one.
AREAS = {
    "kitchen": ("kitchen",),
    "living room": ("living room", "living room", "lounge"),
    "bedroom": ("bedroom",),
    "bathroom": ("bathroom",),
    "hall": ("hall", "hall", "hallway"),
    "study": ("study", "study", "office"),
    "nursery": ("nursery",),
    "guest room": ("guest room", "guest room", "spare room"),
    "dining room": ("dining room",),
    "laundry room": ("laundry room",),
    "attic": ("attic", "attic", "loft"),
    "basement": ("basement",),
    "garage": ("garage",),
    "terrace": ("terrace", "terrace", "patio"),
    "garden": ("garden",),
}
OUTDOORS = {"garage", "terrace", "garden"}
USED_OUTDOORS = {"light", "media"}
HELD_BACK = {
    ("light.turn_on", "laundry room"), ("light.turn_off", "attic"), ("light.set_brightness", "terrace"),
    ("light.set_color", "bathroom"), ("climate.set_temperature", "dining room"), ("cover.open", "guest room"),
    ("cover.close", "kitchen"), ("media.play", "study"), ("media.pause", "hall"), ("vacuum.start", "basement"),
    ("fan.turn_on", "nursery"),
}  # fmt: skip
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = (
    "", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)  # fmt: skip
ORDERS = {
    "add", "adjust", "bolt", "bring", "buy", "call", "cancel", "change", "clean", "clear", "close", "continue",
    "cool", "crank", "cut", "darken", "dim", "dock", "draw", "drop", "fill", "find", "flash", "get", "give", "have",
    "heat", "hoover", "illuminate", "keep", "kill", "leave", "let", "lift", "lock", "lower", "make", "mop", "move",
    "mute", "note", "open", "paint", "park", "pause", "play", "pull", "put", "raise", "read", "release", "remind",
    "resume", "return", "roll", "secure", "send", "set", "shuffle", "shut", "skip", "start", "stop", "sweep",
    "switch", "take", "tell", "turn", "unbolt", "undo", "unlock", "wake", "warm",
}  # fmt: skip
QUESTIONS = {
    "any", "anything", "are", "can", "chance", "did", "do", "does", "has", "how", "how's", "humidity", "is", "was",
    "what", "what's", "when", "where", "which", "who", "will",
}  # fmt: skip
POLITE = (
    "please {}", "{} please", "{}, please", "could you {}?", "can you {}", "would you {} please?", "hey, {}",
    "I'd like you to {}", "{}, thanks", "be so kind and {}", "{} now", "ok, {}",
)  # fmt: skip


def in_words(number: int) -> str:
    """42 -> forty-two, for 0 to 100; larger numbers stay digits."""
    if number > 100:
        return str(number)
    if number < 20:
        return ONES[number]
    if number == 100:
        return "a hundred"
    return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def numbers(values: range, *forms: str) -> dict[int, tuple[str, ...]]:
    """Each value with its spoken forms: `#` stands for digits, `@` for words."""
    return {n: tuple(form.replace("#", str(n)).replace("@", in_words(n)) for form in forms) for n in values}


def plain(*words: str) -> dict[str, tuple[str, ...]]:
    """Values that are spoken as they are written."""
    return {word: (word,) for word in words}


def minutes() -> dict[int, tuple[str, ...]]:
    """Durations of a timer, the common ones with their everyday names."""
    spoken = numbers(range(2, 61), "# minutes", "# minutes", "@ minutes", "# min")
    spoken[15] += ("a quarter of an hour",)
    spoken[30] += ("half an hour", "half an hour")
    spoken[60] = ("an hour", "one hour", "60 minutes", "sixty minutes")
    return spoken | {90: ("an hour and a half", "90 minutes"), 120: ("two hours", "2 hours")}


SLOTS: dict[str, Mapping[int, tuple[str, ...]] | Mapping[str, tuple[str, ...]]] = {
    "area": AREAS,
    "door": plain("front", "back", "side", "cellar", "balcony", "garage"),
    "brightness": numbers(range(5, 101, 5), "# percent", "#%", "@ percent"),
    "position": numbers(range(10, 91, 5), "# percent", "#%", "@ percent"),
    "volume": numbers(range(5, 101, 5), "#", "# percent", "#%", "@", "@ percent"),
    "percent": numbers(range(5, 100, 5), "#"),
    "temperature": numbers(range(15, 27), "# degrees", "#", "@ degrees", "@"),
    "minutes": minutes(),
    "count": numbers(range(2, 13), "#"),
    "oven": numbers(range(160, 241, 10), "#"),
    "color": plain("red", "green", "blue", "yellow", "orange", "purple", "pink", "white", "turquoise"),
    "item": plain("milk", "eggs", "butter", "olive oil", "toothpaste", "coffee", "flour", "dish soap", "apples",
                  "cat food", "rice", "toilet paper", "mustard", "oat flakes", "tomatoes", "honey", "tea lights"),
    "city": plain("Bergen", "Lisbon", "Vienna", "Dublin", "Nairobi", "Kyoto", "Montreal", "Naples", "Ghent"),
    "day": plain("tomorrow", "tonight", "on Monday", "on Wednesday", "on Friday", "on Saturday", "on Sunday"),
    "clock": plain("6:30", "7:00", "7:45", "9:15", "10:00", "12:30", "15:20", "17:10", "19:00", "21:40", "23:05"),
    "artist": plain("some jazz", "Mozart", "the Beatles", "old tango records", "Nina Simone", "a brass band",
                    "piano music", "folk songs", "that new rock album", "Bach", "children's songs"),
    "sky": plain("light rain", "clear skies", "heavy clouds", "fog", "snow showers", "thunder", "bright sunshine"),
}  # fmt: skip


@dataclass(frozen=True)
class Template:
    """One line of a source file: its section, both sides of `=>`, and the only split that may use it, if any."""

    section: tuple[str, ...]
    service: str
    only: str | None
    sentence: str
    result: str = ""

    @property
    def slots(self) -> list[str]:
        """The slots of both sides, without duplicates."""
        return list(dict.fromkeys(re.findall(r"\{(\w+)\}", self.sentence + self.result)))


@dataclass(frozen=True)
class Filled:
    """A template with a value for each slot; `spoken` has the values as the sentence says them."""

    template: Template
    values: dict[str, int | str]
    spoken: dict[str, str]

    @property
    def key(self) -> str:
        """Identifies the template and its values, which must not be in two splits."""
        return f"{self.template.sentence} {self.values}"

    @property
    def held_back(self) -> bool:
        """Whether training must not see this service in this area."""
        return (self.template.service, self.values.get("area")) in HELD_BACK


def read_templates(task: str) -> list[Template]:
    """The templates of a source file, in order."""
    templates: list[Template] = []
    section: tuple[str, ...] = ()
    for line in (HERE / "source" / f"{task}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = tuple(line.strip("[]").split())
        elif line and not line.startswith("#"):
            only = {"v:": "validation", "t:": "test"}.get(line[:2])
            sentence, _, result = (line[2:] if only else line).strip().partition(" => ")
            named = re.search(r'"service": "([\w.]+)"', line)
            templates.append(Template(section, named[1] if named else section[0], only, sentence, result))
    return templates


def intent_templates() -> list[Template]:
    """The templates of the intent task, together with those of the services that its labels name."""
    own = read_templates("intent")
    label_of = {service: template.section[0] for template in own for service in template.section[1:]}
    borrowed = [template for template in read_templates("command") if template.section[0] in label_of]
    return own + [Template((label_of[t.service],), t.service, t.only, t.sentence) for t in borrowed]


def fill(template: Template, rng: random.Random) -> Filled:
    """Draw a value and its spoken form for each slot of the template."""
    values: dict[str, int | str] = {}
    spoken = {}
    indoors = template.service.split(".")[0] not in USED_OUTDOORS
    for slot in template.slots:
        choices = [(value, forms) for value, forms in SLOTS[slot].items() if not (indoors and value in OUTDOORS)]
        values[slot], forms = rng.choice(choices)
        spoken[slot] = rng.choice(forms)
    return Filled(template, values, spoken)


def replace(text: str, words: Mapping[str, int | str], rng: random.Random) -> str:
    """Fill the slots and choose one of each (one|two); "in the terrace" becomes "on the terrace"."""
    text = re.sub(r"\(([^()]*\|[^()]*)\)", lambda match: rng.choice(match[1].split("|")), text)
    text = re.sub(r"\{(\w+)\}", lambda match: str(words[match[1]]), text)
    text = re.sub(r"\bin(to)? the (terrace|patio)", r"on\1 the \2", text)
    return " ".join(text.split())


def say(filled: Filled, rng: random.Random) -> str:
    """The sentence as somebody might say or type it: polite or not, with or without capitals, sometimes with a typo."""
    text = replace(filled.template.sentence, filled.spoken, rng)
    if text.split()[0] in ORDERS and text[-1] not in "?.!" and rng.random() < 0.4:
        text = rng.choice(POLITE).format(text)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
        text += "" if text[-1] in "?.!" else "?" if text.split()[0].lower() in QUESTIONS else "."
    elif rng.random() < 0.3:
        text = text.rstrip(".?!").lower()
    return misspell(text, rng) if rng.random() < SHARE_OF_TYPOS else text


def misspell(text: str, rng: random.Random) -> str:
    """Swap two neighboring letters inside one longer word."""
    places = [match.start() + 1 for match in re.finditer(r"[A-Za-z]{5,}", text)]
    if not places:
        return text
    at = rng.choice(places)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def command_row(filled: Filled, rng: random.Random) -> Row:
    """A sentence and the service call that it asks for."""
    template = filled.template
    if template.section == ("by", "hand"):
        return {"prompt": say(filled, rng), "completion": json.loads(template.result)}
    fixed = {slot: int(value) for slot, value in (pair.split("=") for pair in template.result.split())}
    values = filled.values | fixed
    call = {"service": template.service} | {slot: values[slot] for slot in template.section[1:]}
    return {"prompt": say(filled, rng), "completion": call}


def intent_row(filled: Filled, rng: random.Random) -> Row:
    """A sentence and its label."""
    return {"text": say(filled, rng), "label": filled.template.section[0]}


def reply_row(filled: Filled, rng: random.Random) -> Row:
    """An event, as the home reports it, and the butler's sentence."""
    event, sentence = (replace(text, filled.values, rng) for text in (filled.template.sentence, filled.template.result))
    return {"messages": [{"role": "user", "content": event}, {"role": "assistant", "content": sentence}]}


def draw(templates: list[Template], rng: random.Random) -> Iterator[Template]:
    """An endless iterator of templates: first those without slots, then a random one of each section in turn."""
    yield from (template for template in templates if not template.slots)
    sections: dict[str, list[Template]] = {}
    for template in templates:
        if template.slots:
            sections.setdefault(template.section[0], []).append(template)
    while True:
        for members in sections.values():
            yield rng.choice(members)


def draw_split(split: str, size: int, templates: list[Template], taken: set[str], rng: random.Random) -> list[Filled]:
    """Filled templates for one split, none of which is in `taken`; adds them to `taken`."""
    own = draw([template for template in templates if template.only == split], rng)
    shared = draw([t for t in templates if not t.only and (t.slots or split == "train")], rng)
    chosen: list[Filled] = []
    while len(chosen) < size:
        unseen_in_training = split != "train" and len(chosen) < size // 2
        filled = fill(next(own if unseen_in_training else shared), rng)
        if filled.key not in taken and not (split == "train" and filled.held_back):
            taken.add(filled.key)
            chosen.append(filled)
    rng.shuffle(chosen)
    return chosen


def write_task(task: str, templates: list[Template], make_row: Callable[[Filled, random.Random], Row]) -> None:
    """Write the three files of a task."""
    rng, taken = random.Random(task), set[str]()
    for split in ("test", "validation", "train"):
        rows = [make_row(filled, rng) for filled in draw_split(split, SIZES[task][split], templates, taken, rng)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"{task}-{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write_task("command", read_templates("command"), command_row)
    write_task("intent", intent_templates(), intent_row)
    write_task("reply", read_templates("reply"), reply_row)

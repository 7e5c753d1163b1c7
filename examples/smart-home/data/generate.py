"""Frames in source/*.txt in, nine JSONL files out: train, validation and test rows of the three tasks.

Run it again after an edit of the frames or of the words below: `python examples/smart-home/data/generate.py`. The same
frames give the same files. What is measured is never trained: a frame with its values occurs in one split only, half of
the validation and test rows come from frames that training never sees, and some pairs of service and area (HELD_BACK)
are asked for outside training only.
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
    """Values that are said as they are written."""
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
class Frame:
    """One line of a source file, under the words of its section: both sides of `=>`, the split that alone uses it."""

    section: tuple[str, ...]
    service: str
    only: str | None
    sentence: str
    result: str = ""

    @property
    def slots(self) -> list[str]:
        """The slots of both sides, each once."""
        return list(dict.fromkeys(re.findall(r"\{(\w+)\}", self.sentence + self.result)))


@dataclass(frozen=True)
class Filled:
    """A frame with a value for each slot; spoken is how the sentence says it."""

    frame: Frame
    values: dict[str, int | str]
    spoken: dict[str, str]

    @property
    def key(self) -> str:
        """What must not occur in two splits, however it is said."""
        return f"{self.frame.sentence} {self.values}"

    @property
    def held_back(self) -> bool:
        """Whether training must not see this service in this area."""
        return (self.frame.service, self.values.get("area")) in HELD_BACK


def read_frames(task: str) -> list[Frame]:
    """The frames of a source file, in its order."""
    frames: list[Frame] = []
    section: tuple[str, ...] = ()
    for line in (HERE / "source" / f"{task}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = tuple(line.strip("[]").split())
        elif line and not line.startswith("#"):
            only = {"v:": "validation", "t:": "test"}.get(line[:2])
            sentence, _, result = (line[2:] if only else line).strip().partition(" => ")
            named = re.search(r'"service": "([\w.]+)"', line)
            frames.append(Frame(section, named[1] if named else section[0], only, sentence, result))
    return frames


def intent_frames() -> list[Frame]:
    """The frames of the intent task, together with those of the services that its labels name."""
    own = read_frames("intent")
    label_of = {service: frame.section[0] for frame in own for service in frame.section[1:]}
    borrowed = [frame for frame in read_frames("command") if frame.section[0] in label_of]
    return own + [Frame((label_of[frame.service],), frame.service, frame.only, frame.sentence) for frame in borrowed]


def fill(frame: Frame, rng: random.Random) -> Filled:
    """Draw a value and its spoken form for each slot of the frame."""
    values: dict[str, int | str] = {}
    spoken = {}
    indoors = frame.service.split(".")[0] not in USED_OUTDOORS
    for slot in frame.slots:
        choices = [(value, forms) for value, forms in SLOTS[slot].items() if not (indoors and value in OUTDOORS)]
        values[slot], forms = rng.choice(choices)
        spoken[slot] = rng.choice(forms)
    return Filled(frame, values, spoken)


def replace(text: str, words: Mapping[str, int | str], rng: random.Random) -> str:
    """Put the words into the slots and choose one of each (one|two); one is on a terrace, not in it."""
    text = re.sub(r"\(([^()]*\|[^()]*)\)", lambda match: rng.choice(match[1].split("|")), text)
    text = re.sub(r"\{(\w+)\}", lambda match: str(words[match[1]]), text)
    text = re.sub(r"\bin(to)? the (terrace|patio)", r"on\1 the \2", text)
    return " ".join(text.split())


def say(filled: Filled, rng: random.Random) -> str:
    """The sentence as somebody might say or type it: polite or not, with or without capitals, now and then misspelt."""
    text = replace(filled.frame.sentence, filled.spoken, rng)
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
    frame = filled.frame
    if frame.section == ("by", "hand"):
        return {"prompt": say(filled, rng), "completion": json.loads(frame.result)}
    fixed = {slot: int(value) for slot, value in (pair.split("=") for pair in frame.result.split())}
    values = filled.values | fixed
    call = {"service": frame.service} | {slot: values[slot] for slot in frame.section[1:]}
    return {"prompt": say(filled, rng), "completion": call}


def intent_row(filled: Filled, rng: random.Random) -> Row:
    """A sentence and its label."""
    return {"text": say(filled, rng), "label": filled.frame.section[0]}


def reply_row(filled: Filled, rng: random.Random) -> Row:
    """What happened, as the home reports it, and the butler's sentence."""
    event, sentence = (replace(text, filled.values, rng) for text in (filled.frame.sentence, filled.frame.result))
    return {"messages": [{"role": "user", "content": event}, {"role": "assistant", "content": sentence}]}


def draw(frames: list[Frame], rng: random.Random) -> Iterator[Frame]:
    """Frames without end: first those without slots, then the sections in turn, within a section by chance."""
    yield from (frame for frame in frames if not frame.slots)
    sections: dict[str, list[Frame]] = {}
    for frame in frames:
        if frame.slots:
            sections.setdefault(frame.section[0], []).append(frame)
    while True:
        for members in sections.values():
            yield rng.choice(members)


def draw_split(split: str, size: int, frames: list[Frame], taken: set[str], rng: random.Random) -> list[Filled]:
    """Filled frames for one split, none of them in `taken`, to which they are added."""
    own = draw([frame for frame in frames if frame.only == split], rng)
    shared = draw([frame for frame in frames if not frame.only and (frame.slots or split == "train")], rng)
    chosen: list[Filled] = []
    while len(chosen) < size:
        unseen_in_training = split != "train" and len(chosen) < size // 2
        filled = fill(next(own if unseen_in_training else shared), rng)
        if filled.key not in taken and not (split == "train" and filled.held_back):
            taken.add(filled.key)
            chosen.append(filled)
    rng.shuffle(chosen)
    return chosen


def write_task(task: str, frames: list[Frame], make_row: Callable[[Filled, random.Random], Row]) -> None:
    """Write the three files of a task."""
    rng, taken = random.Random(task), set[str]()
    for split in ("test", "validation", "train"):
        rows = [make_row(filled, rng) for filled in draw_split(split, SIZES[task][split], frames, taken, rng)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"{task}-{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write_task("command", read_frames("command"), command_row)
    write_task("intent", intent_frames(), intent_row)
    write_task("reply", read_frames("reply"), reply_row)

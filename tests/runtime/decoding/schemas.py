"""Forms of answers as applications have them, as pydantic models, which check what is decoded."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, Field

Short = Annotated[str, Field(max_length=12)]


class Command(BaseModel):
    """A smart home's command, most of whose keys are optional."""

    service: Literal["light.turn_on", "light.turn_off", "light.set_color", "fan.turn_on", "timer.start"]
    area: Literal["kitchen", "living room", "café ☕"] | None = None
    volume: Annotated[int, Field(ge=0, le=100)] | None = None
    minutes: Annotated[int, Field(gt=0, lt=600)] = 5


class TurnOn(BaseModel):
    """Home Assistant's tool of this name."""

    tool: Literal["HassTurnOn"]
    name: Short
    domain: list[Literal["light", "switch", "fan"]] = Field(default=["light"], max_length=3)


class SetTemperature(BaseModel):
    """Home Assistant's tool of this name."""

    tool: Literal["HassClimateSetTemperature"]
    temperature: Annotated[float, Field(ge=5, le=30)]
    area: Short = "hall"


class Calls(BaseModel):
    """One or more calls of tools."""

    calls: Annotated[list[TurnOn | SetTemperature], Field(min_length=1, max_length=3)]


class Slots(BaseModel):
    """Slots of an intent, any of which may be absent."""

    artist: str | None = None
    playlist: str | None = None
    time_range: str | None = None


class Intent(BaseModel):
    """An intent with its slots."""

    intent: Literal["AddToPlaylist", "PlayMusic", "GetWeather"]
    slots: Slots


class Address(BaseModel):
    """Where someone lives."""

    street: Annotated[str, Field(min_length=1, max_length=8)]
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{3,5}$")]


class Person(BaseModel):
    """Nested objects and null."""

    name: str
    address: Address
    former: Address | None
    member: bool


class Weather(BaseModel):
    """Numbers with and without bounds."""

    temperature: Annotated[float, Field(gt=-60.5, lt=60)]
    humidity: Annotated[int, Field(ge=0, le=100, multiple_of=5)]
    pressure: float
    hours: Annotated[list[Annotated[int, Field(ge=-40, le=50)]], Field(min_length=3, max_length=3)]


class Node(BaseModel):
    """A tree."""

    value: Annotated[int, Field(ge=-9, le=9)]
    children: Annotated[list[Node], Field(max_length=2)] = []


class Scores(BaseModel):
    """Keys that the answer chooses."""

    scores: dict[str, Annotated[int, Field(ge=0, le=10)]]
    done: bool


class Device(BaseModel):
    """Formats of strings."""

    id: UUID
    address: Annotated[str, Field(json_schema_extra={"format": "ipv4"})]
    state: Literal[True, 1.5, "on", None]


class Grid(BaseModel):
    """Lists of lists, and a tuple."""

    rows: Annotated[list[Annotated[list[bool], Field(min_length=1, max_length=3)]], Field(max_length=3)]
    corner: tuple[int, str]


class Reply(BaseModel):
    """Free text with escapes."""

    text: Annotated[str, Field(min_length=2)]
    quotes: Literal['say "hi"', "back\\slash", "line\nbreak", "tab\t"]


FORMS: tuple[type[BaseModel], ...] = (
    Command,
    Calls,
    Intent,
    Person,
    Weather,
    Node,
    Scores,
    Device,
    Grid,
    Reply,
)

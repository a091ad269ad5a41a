"""What the text of an answer must be: `response_format`, `structured_outputs`, and older names of its parts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from app.schemas.json import BodyError
from app.schemas.wire import WireModel, refuse

MAX_CHOICES = 10_000
MAX_FORMAT_NAME_CHARACTERS = 64


def _check_schema(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, (dict, str)) or not value:
        raise refuse("json_schema_type", "should be a JSON schema: an object, or its JSON text")
    return value


def _check_choices(value: Any) -> list[str]:
    if not isinstance(value, list) or set(map(type, value)) != {str} or "" in value:
        raise refuse("choices_type", "should be a list of strings, none of them empty")
    if len(value) > MAX_CHOICES:
        raise refuse("choices_count", f"should hold at most {MAX_CHOICES} strings")
    return value


_SCHEMA_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "string", "minLength": 1}]}
_CHOICES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_CHOICES,
    "items": {"type": "string", "minLength": 1},
}
JsonSchema = Annotated[dict[str, Any] | str | None, PlainValidator(_check_schema), WithJsonSchema(_SCHEMA_SCHEMA)]
Choices = Annotated[list[str] | None, PlainValidator(_check_choices), WithJsonSchema(_CHOICES_SCHEMA)]
Pattern = Annotated[str | None, Field(min_length=1)]

_OUTPUT_FIELDS = frozenset(
    ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
)
_ONE_OF = ("json", "regex", "choice", "grammar", "json_object")
NEEDS_ONE = f"'structured_outputs' should have exactly one of {', '.join(map(repr, _ONE_OF))}"


class JsonSchemaFormat(WireModel):
    """A JSON schema with a name."""

    name: str = Field(
        min_length=1, max_length=MAX_FORMAT_NAME_CHARACTERS, description="of the format; not shown to the model"
    )
    description: str | None = Field(default=None, description="what it is for; not shown to the model")
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="the JSON schema; any JSON object when left out"
    )
    strict: bool = Field(default=False, description="no effect: the output is held to the schema in any case")


class ResponseFormat(WireModel):
    """The form of the whole output."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`text`: any; `json_object`: a JSON object; `json_schema`: JSON that `json_schema` describes"
    )
    json_schema: JsonSchemaFormat | None = Field(default=None, description="for the type of this name, and only there")

    @model_validator(mode="after")
    def _check_together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise BodyError(
                "'response_format.json_schema' goes together with the type 'json_schema', and with no other",
                "response_format.json_schema",
            )
        return self


class StructuredOutputs(WireModel):
    """The form of the whole output, in exactly one way."""

    json_: JsonSchema = Field(default=None, alias="json", description="JSON that this schema describes")
    regex: Pattern = Field(default=None, description="text that this regular expression matches as a whole")
    choice: Choices = Field(default=None, description="one of these strings")
    grammar: Pattern = Field(default=None, description="text of this grammar: `root ::= ...`, or Lark's form")
    json_object: Literal[True] | None = Field(default=None, description="any JSON object")

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        # fields that are not known here may be known as not supported, which is told when the request is translated
        if len(self.given) != 1 and not (self.model_extra and not self.given):
            raise BodyError(NEEDS_ONE, "structured_outputs")
        return self

    @property
    def given(self) -> set[str]:
        """Names of the fields that demand a form: one, unless there are none but unknown ones."""
        return self.model_fields_set - set(self.model_extra or ())


class OutputFields(WireModel):
    """The part of a request that says what its outputs must be. At most one of these may demand anything."""

    response_format: ResponseFormat | None = Field(
        default=None, description="the form of the whole output, in OpenAI's way; any text when left out"
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="the form of the whole output, in vLLM's way; any text when left out"
    )
    guided_json: JsonSchema = Field(default=None, description="older name of `structured_outputs.json`")
    guided_regex: Pattern = Field(default=None, description="older name of `structured_outputs.regex`")
    guided_choice: Choices = Field(default=None, description="older name of `structured_outputs.choice`")
    guided_grammar: Pattern = Field(default=None, description="older name of `structured_outputs.grammar`")

    @model_validator(mode="after")
    def _check_one_form(self) -> OutputFields:
        demands = self.demands
        if len(demands) > 1:
            raise BodyError(f"'{demands[0]}' and '{demands[1]}' may not both be given", demands[1])
        return self

    @property
    def demands(self) -> list[str]:
        """Names of the fields that demand a form: one at most, once the request is checked."""
        given = self.model_fields_set & _OUTPUT_FIELDS
        if "response_format" in given and (self.response_format is None or self.response_format.type == "text"):
            given -= {"response_format"}
        return sorted(given)

"""Only permissive licences pass, whichever way the metadata states them."""

from __future__ import annotations

from email.message import Message

import pytest

from models.recipe.licences import has_forbidden_notice, judge_distribution, judge_expression


def metadata(expression: str = "", field: str = "", classifiers: tuple[str, ...] = ()) -> Message:
    message = Message()
    if expression:
        message["License-Expression"] = expression
    if field:
        message["License"] = field
    for classifier in classifiers:
        message["Classifier"] = f"License :: OSI Approved :: {classifier}"
    return message


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("apache-2.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
        ("GPL-3.0-or-later OR MIT", True),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", False),
        ("(MIT OR GPL-2.0-only) AND BSD-2-Clause", True),
        ("MIT AND LGPL-2.1-or-later", False),
        ("LicenseRef-NVIDIA-Proprietary", False),
        ("MIT AND", False),
        ("(MIT", False),
        ("MIT BSD-3-Clause", False),
        ("", False),
    ],
)
def test_expressions_need_every_and_and_one_of_each_or(expression: str, expected: bool) -> None:
    assert judge_expression(expression) is expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (metadata(expression="BSD-3-Clause"), True),
        (metadata(expression="MPL-2.0", classifiers=("MIT License",)), False),
        (metadata(classifiers=("BSD License",)), True),
        (metadata(classifiers=("MIT License", "Apache Software License")), True),
        (metadata(classifiers=("MIT License", "Mozilla Public License 2.0 (MPL 2.0)")), False),
        (metadata(classifiers=("GNU General Public License v3 (GPLv3)",)), False),
        (metadata(classifiers=("Other/Proprietary License",)), False),
        (metadata(field="MPL-2.0 AND MIT", classifiers=("MIT License",)), False),
        (metadata(field="Apache 2.0 License"), True),
        (metadata(field="3-Clause BSD License"), True),
        (metadata(field="LGPL"), False),
        (metadata(field="Copyright (c) A\n" + "x" * 100 + " Permission is hereby granted, free of charge"), True),
        (metadata(field="Permission is hereby granted, free of charge " + "x" * 100 + " GNU General Public"), False),
        (metadata(field="NVIDIA Proprietary Software"), False),
        (metadata(field="Something of our own"), False),
        (metadata(field="UNKNOWN"), False),
        (metadata(), False),
    ],
)
def test_distributions(message: Message, expected: bool) -> None:
    verdict = judge_distribution(message)

    assert verdict.is_permissive is expected
    assert bool(verdict.reason) is not expected


def test_a_bare_osi_classifier_says_nothing() -> None:
    message = Message()
    message["Classifier"] = "License :: OSI Approved"

    assert not judge_distribution(message).is_permissive


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("# SPDX-License-Identifier: Apache-2.0\n", False),
        ("# SPDX-License-Identifier: GPL-2.0-only\n", True),
        ("# SPDX-License-Identifier: LicenseRef-NvidiaProprietary\n", True),
        ("# under the terms of the GNU Lesser General Public License\n", True),
        ("# Licensed under the MIT licence\n", False),
    ],
)
def test_notices_of_single_files(head: str, expected: bool) -> None:
    assert has_forbidden_notice(head) is expected

"""The schemas of the three tables: UCI Adult, Bank Marketing and Default of Credit Card Clients."""

from splitlearn.data.table import Schema

__all__ = ["ADULT", "BANK", "CREDIT"]

ADULT = Schema(
    target="income",
    classes={"<=50K": 0, ">50K": 1, "<=50K.": 0, ">50K.": 1},  # the test file ends its labels with a stop
    numeric=("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week"),
    categorical=(
        "workclass",
        "education",
        "marital-status",
        "occupation",
        "relationship",
        "race",
        "sex",
        "native-country",
    ),
    header=(
        "age",
        "workclass",
        "fnlwgt",
        "education",
        "education-num",
        "marital-status",
        "occupation",
        "relationship",
        "race",
        "sex",
        "capital-gain",
        "capital-loss",
        "hours-per-week",
        "native-country",
        "income",
    ),
    comment="|",
)
"""Becker and Kohavi 1996: does a person earn more than 50,000 dollars a year? ``?`` is a category of its own."""

BANK = Schema(
    target="y",
    classes={"no": 0, "yes": 1},
    numeric=("age", "balance", "day", "duration", "campaign", "pdays", "previous"),
    categorical=(
        "job",
        "marital",
        "education",
        "default",
        "housing",
        "loan",
        "contact",
        "month",
        "poutcome",
    ),
    separator=";",
)
"""Moro, Cortez and Rita 2014: does a client subscribe to a term deposit?"""

CREDIT = Schema(
    target="default.payment.next.month",
    classes={"0": 0, "1": 1},
    numeric=(
        "LIMIT_BAL",
        "AGE",
        "PAY_0",
        *(f"PAY_{month}" for month in range(2, 7)),
        *(f"BILL_AMT{month}" for month in range(1, 7)),
        *(f"PAY_AMT{month}" for month in range(1, 7)),
    ),
    categorical=("SEX", "EDUCATION", "MARRIAGE"),
)
"""Yeh and Lien 2009: does a client default next month? The number of the row (``ID``) is left out."""

"""Answers to problems of grade-school mathematics, in the styles of many models, marked by hand.

Each line: the generated text, the right answer as GSM8K writes it (the end of its solution), and whether the text is
right. The mark is that of a person who reads the whole answer.
"""

MARKED = [
    # As GSM8K writes it.
    ("Janet sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18.\n#### 18", "9 * 2 = 18 dollars.\n#### 18", True),
    ("16 - 3 = 13 eggs, so 13 * 2 = $26.\n#### 26", "#### 18", False),
    ("80,000 * 1.5 = 120,000, and 200,000 - 130,000 = 70,000\n#### 70,000", "#### 70000", True),
    ("The value rose by 70000.\n#### $70,000.00", "#### 70,000", True),
    ("He spends 3 * 60 = 180 minutes.\n####180 minutes", "#### 180", True),
    ("Each gets 5 / 2 = 2.5 litres.\n#### 2.50", "#### 2.5", True),
    ("He lost money: 20 - 25 = -5\n#### -5", "#### -5", True),
    ("He lost money: 25 - 20 = 5\n#### 5", "#### -5", False),
    # Runs on into another question, or checks itself after the answer.
    ("9 * 2 = 18\n#### 18\n\nQuestion: A robe takes 2 bolts.\nAnswer: 2 + 1 = 3\n#### 3", "#### 18", True),
    ("2 + 1 = 3\n#### 3\n\nQuestion: Tom has 18 eggs.\nAnswer: 18\n#### 18", "#### 18", False),
    ("The answer is 64. (Check: 8 glasses at $5 and 8 at $3.)", "#### 64", True),
    ("The answer is 65. We can check this: 8 * 8 = 64.", "#### 64", False),
    # Without the mark.
    ("So Kylar needs to pay 8 * 5 + 8 * 3 = 64 dollars.", "#### 64", True),
    ("So Kylar pays $40 for the 8 at full price and $24 for the others: $64 altogether", "#### 64", True),
    ("Therefore, the total is **$1,250**.", "#### 1250", True),
    ("Toulouse and Charleston have 80 + 160 = 240 sheep, and with Seattle's 20 that is 260.", "#### 260", True),
    ("The answer is 6 * 7 = 42 apples.", "#### 42", True),
    ("**Answer:** 42 apples", "#### 42", True),
    ("Final answer: $-12", "#### -12", True),
    ("The final answer to this problem is −12 degrees.", "#### -12", True),
    ("The temperature falls by 12, so the answer is 12.", "#### -12", False),
    ("Let x be the cost. 3x = 45, x = 15.\n\nThe answer is $15.00.", "#### 15", True),
    ("First guess: the answer is 10. No, he also pays tax, so the answer is 11.", "#### 11", True),
    ("\\[ 5 \\times 13 = 65 \\]\n\\boxed{65}", "#### 65", True),
    ("The total is $\\boxed{\\$1{,}430}$ after 3 years.", "#### 1430", True),
    ("Thus $x = \\frac{90}{2} = 45$, and the answer is $\\boxed{45\\%}$.", "#### 45", True),
    ("It takes 1/2 of the 3 bolts.\n#### 1.5", "#### 1.5", True),
    ("She walks 3 1/2 miles.", "#### 3.5", True),
    ("Each child gets 1/4.", "#### 0.25", True),
    ("He earns 1.5 million dollars.", "#### 1500000", True),
    ("The garden has an area of 12 m^2.", "#### 12", True),
    ("The garden has an area of 144 m2.", "#### 144", True),
    ("The garden is 12 m2, so two of them are 24 m2.", "#### 12", False),
    ("They have 20-5 = 15 left, that is 15.", "#### 15", True),
    ("The answer is between 10-20.", "#### -20", False),  # a range, not a negative number
    ("I am not sure, but probably eighteen eggs", "#### 17", False),
    ("I cannot solve this problem without more information.", "#### 18", False),
    ("", "#### 18", False),
    ("She has 1,000,000 + 500 = 1,000,500 points.", "#### 1000500", True),
    ("모두 합하면 24 * 3 = 72이므로 답은 72개입니다.", "#### 72", True),
]

# A person would call these right. The number that counts is the last one, and number words are no numbers.
MISSED = [
    ("So Kylar needs to pay $64 for all 16 glasses.", "#### 64"),
    ("She sells eighteen eggs.", "#### 18"),
]

"""Short English stories told by a seeded grammar: the text of the demo.

The stories show what a teacher is for. Many parts are free choices (who, where, what happens next). A text shows only
the choice that was made; a trained teacher knows how likely each one was. The other parts follow from the story so far:
pronouns, sums and differences, where a thing was hidden, the way back. `python -m hf_distill.demo.text` prints ten.
"""

import math
import random
from typing import NamedTuple


class Person(NamedTuple):
    name: str
    they: str
    them: str
    their: str


PEOPLE = [
    Person(name, "she", "her", "her") if is_woman else Person(name, "he", "him", "his")
    for name, is_woman in zip(
        "Anna Tom Clara Ben Mira Otto Ruth Felix Nora Hugo Ella Karl Iris Emil Vera Jonas".split(),
        [True, False] * 8,
        strict=True,
    )
]
# In every list the most usual comes first: `Storyteller.pick` takes option k with a weight of 1 / k.
GOODS = {
    "market": ["apple", "pear", "carrot", "plum", "melon", "onion"],
    "forest": ["mushroom", "nut", "feather", "acorn", "stick"],
    "harbour": ["herring", "crab", "shell", "rope", "net"],
    "garden": ["rose", "lemon", "tulip", "bean", "pumpkin"],
    "farm": ["egg", "turnip", "goose feather", "cabbage", "pumpkin"],
    "workshop": ["candle", "nail", "lamp", "bell", "button"],
}
PLACES = ["mill", "bridge", "harbour", "church", "farm", "well", "school", "castle", "inn", "old oak"]
WEATHER = {
    "sunny": ["a straw hat", "a bottle of water", "no coat"],
    "rainy": ["an umbrella", "a long coat", "high boots"],
    "cold": ["a scarf", "a long coat", "warm gloves"],
    "foggy": ["a lantern", "a whistle", "a map"],
}
TREASURES = ["key", "ring", "letter", "coin", "watch", "map", "flute"]
LOOKS = ["silver", "golden", "old", "tiny", "blue", "broken"]
HIDING_PLACES = ["under the bed", "in the drawer", "behind the clock", "in the jar", "on the shelf", "under the mat"]
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()


def count(number: int, thing: str) -> str:
    """`count(1, "pear")` is "one pear", `count(3, "pear")` is "three pears"."""
    return f"{NUMBERS[number]} {thing}" if number == 1 else f"{NUMBERS[number]} {thing}s"


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


class Storyteller:
    """Tells one story after the other. `nats` is the sum of -log p over all choices so far.

    Every choice can be read off the text, so `nats` is also -log of the probability of the stories themselves: a lower
    bound for the expected loss of any model. Only `Random.random` is used, which is the same in every Python version.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.nats = 0.0

    def pick(self, *options):
        weights = [1 / k for k in range(1, len(options) + 1)]
        point = self.random.random() * sum(weights)
        chosen = 0
        while chosen < len(options) - 1 and point >= weights[chosen]:
            point -= weights[chosen]
            chosen += 1
        self.nats -= math.log(weights[chosen] / sum(weights))
        return options[chosen]

    def pick_several(self, number: int, options) -> list:
        left, picked = list(options), []
        for _ in range(number):
            picked.append(self.pick(*left))
            left.remove(picked[-1])
        return picked

    def tell(self) -> str:
        return self.pick(self.basket, self.hidden_thing, self.purse, self.errand, self.race)()

    def outing(self, who: Person, where: str) -> str:
        weather = self.pick(*WEATHER)
        time = self.pick("morning", "day", "afternoon", "evening")
        start = self.pick(f"One {weather} {time}", f"It was a {weather} {time}, and")
        taking = self.pick("", *(f" and took {thing} along" for thing in WEATHER[weather]))
        return f"{start} {who.name} went to the {where}{taking}."

    def basket(self) -> str:
        hero, friend = self.pick_several(2, PEOPLE)
        where = self.pick(*GOODS)
        first, second = self.pick_several(2, GOODS[where])
        num_first, num_second = self.pick(3, 4, 2, 5, 6), self.pick(2, 1, 3, 4)
        verb = self.pick(*(["found", "picked up"] if where in ("forest", "garden") else ["bought", "was given"]))
        num_lost = self.pick(*range(1, num_first))
        loss = self.pick("gave {them} {it}", "sold {them} {it}", "lost {it} at dice", "dropped {it} in fright")
        loss = loss.format(them=friend.them, it=count(num_lost, first))
        left = num_first - num_lost
        ending = self.pick("That is plenty", "What a good day") if left + num_second > 4 else "Not much"
        return (
            f"{self.outing(hero, where)} {hero.they.title()} {verb} {count(num_first, first)} and "
            f"{count(num_second, second)}. On the way home {hero.they} met {friend.name} and {loss}. "
            f"So {hero.they} came home with {count(left, first)} and "
            f'{count(num_second, second)}. "{ending}," said {hero.name}.'
        )

    def hidden_thing(self) -> str:
        hero, friend = self.pick_several(2, PEOPLE)
        thing, here = self.pick(*TREASURES), self.pick(*HIDING_PLACES)
        start = f"{hero.name} had {a(self.pick(*LOOKS))} {thing} and hid it {here}. "
        start += self.outing(hero, self.pick(*GOODS)) + " Meanwhile "
        if self.pick(True, False):
            there = self.pick(*(place for place in HIDING_PLACES if place != here))
            reason = self.pick("to tease " + hero.them, "to clean the room", "because of a thief")
            when = self.pick("After an hour", "At last", "Soon")
            return start + (
                f"{friend.name} took the {thing} and put it {there} {reason}. When {hero.name} came back, {hero.they} "
                f"looked {here}, but it was gone. {when} {hero.they} found the {thing} {there}"
                f"{self.pick(' and laughed', '', ' and was angry with ' + friend.name)}."
            )
        effort = self.pick("all day", "for an hour", "with a lamp")
        return start + (
            f"{friend.name} looked for the {thing} {effort}, but did not find it. When {hero.name} came back, it was "
            f"still {here}."
        )

    def purse(self) -> str:
        hero = self.pick(*PEOPLE)
        where = self.pick(*GOODS)
        cheap, dear = self.pick_several(2, GOODS[where])
        coins, price = self.pick(6, 8, 5, 10, 12), self.pick(2, 3, 4)
        higher = price + self.pick(3, 1, 5, 6)
        thing, cost = (dear, higher) if higher <= coins else (cheap, price)
        rest = f"had {count(coins - cost, 'coin')} left" if coins > cost else "had nothing left"
        return (
            f"{self.outing(hero, where)} {hero.they.title()} had {count(coins, 'coin')}. {a(cheap).capitalize()} cost "
            f"{NUMBERS[price]} and {a(dear)} cost {NUMBERS[higher]}. {hero.name} "
            f"{self.pick('bought', 'chose', 'took')} the {thing}, paid {count(cost, 'coin')} and {rest}. "
            f"{hero.they.title()} {self.pick('gave', 'showed', 'sold')} the {thing} to {hero.their} "
            f"{self.pick('mother', 'sister', 'neighbour', 'teacher', 'uncle')}."
        )

    def errand(self) -> str:
        hero, friend = self.pick_several(2, PEOPLE)
        home, halfway, goal = self.pick_several(3, PLACES)
        thing, animal = self.pick(*TREASURES), self.pick("dog", "cat", "donkey", "goose")
        deed = self.pick("slept in the sun", "blocked the road", "wanted some bread")
        thanks = self.pick("a soup", "a song", "three coins", "a kiss")
        return (
            f"{hero.name} from the {home} had to bring {a(thing)} to {friend.name}, who lived at the {goal}. "
            f"{hero.they.title()} walked from the {home} to the {halfway}, where {a(animal)} {deed}, and from the "
            f"{halfway} to the {goal}. {friend.name} took the {thing} and thanked {hero.them} with {thanks}. Then "
            f"{hero.name} {self.pick('walked', 'ran', 'rode')} back from the {goal} to the {halfway}, where the "
            f"{animal} {self.pick('still ' + deed, 'was gone')}, and home to the {home}."
        )

    def race(self) -> str:
        hero, friend = self.pick_several(2, PEOPLE)
        start, halfway, goal = self.pick_several(3, PLACES)
        gait, prize = self.pick("ran", "raced", "rode"), self.pick("cake", "ribbon", "medal", "drum")
        regret = self.pick("Had I not {}!", "Why have I {}?", "Alas, I have {}!")
        delay = self.pick("slept", "lost a shoe", "talked to a farmer", "stopped for a drink", "helped a lost child")
        slow, fast = self.pick((hero, friend), (friend, hero))
        return (
            f"{hero.name} and {friend.name} {gait} from the {start} to the {goal}. {slow.name} {delay} at the "
            f"{halfway}, so {fast.name} was first at the {goal} and won a {prize}. "
            f'"{regret.format(delay)}" {self.pick("said", "cried", "laughed")} {slow.name}.'
        )


def stories(num: int, seed: int) -> list[str]:
    """The first `num` stories of this seed, the same on every machine; a smaller `num` gives a prefix."""
    teller = Storyteller(seed)
    return [teller.tell() for _ in range(num)]


if __name__ == "__main__":
    print("\n\n".join(stories(10, seed=0)))

"""The plots of the built-in `stories` grammar: a program that tells a children's story.

Ordinary code that calls a teller ``s``: ``s.say(template)``, ``s.any(*templates)``,
``s.pick(options)``, with what was told before in ``s.known``.  grammar.py runs it as a writer
(choices are drawn) or as a reader (choices follow from the text), so every choice must show in the
text.  It does not know which, nor what its stories cost.

Templates: ``{toy}`` picks a word of that list, ``{a.toy}`` the same with its article,
``{toy>gift}`` also remembers it: from then on ``{gift}`` is known and free; ``{move}`` is a verb
in the story's tense, ``{they.move}`` its plural, ``{base.move}`` its bare form; ``[x|y]`` picks
one; ``<was|is>`` follows the tense.  The options of a slot include the template's next character,
which makes them prefix-free.
"""

from bitbyte.stories.words import WORDS

OPENINGS = {  # weight of each
    "Once upon a time, ": 6,
    "Long ago, ": 3,
    "Many years ago, ": 2,
    "When the world was young, ": 1,
    "Last year, ": 1,
    "Today, ": 2,
    "This year, ": 1,
    "Not far from here, ": 2,
}
PRESENT = ("Today, ", "This year, ", "Not far from here, ")  # these put a story in the present
PRONOUNS = {"girl": ("she", "She", "her"), "boy": ("he", "He", "his")}
MINE = "[{toylook} {mytoy}|{toollook} {mytool}|{wearlook} {mywear}]"

MIDDLE = (
    " {hero} <felt|feels> {glad}, {mood} and {glad}.",
    " {friend} <felt|feels> {low}, {low} and a little {low}.",
    " The air <smelled|smells> of {look} {flower}, {look} {flower} and {taste} {food} pie.",
    " {pet} the {kind} {act} {adverb} and {act}.",
    ' "I feel {glad} and {glad}," {say} {hero}.',
    " Far away, {a.mood}, {mood} {animal} {act} {adverb}.",
    " By the path <grew|grow> {secret} {look} {flower} and {secret} {look} {flower}.",
    " What <was|is> that? {sound}! {sound}! Only {a.mood}, {mood} {animal}.",
    " With a [smile|nod|wink|laugh], {hero} {hold} {his} " + MINE + ".",
    ' "Can you {base.act} and {base.act}?" <asked|asks> {friend}. {hero} {act} {adverb}.',
    " They {they.act} and {they.act} for {secret} minutes.",
    " Then {friend} <told|tells> of {a.mood}, {mood} {animal} and {secret} {look} {count}.",
    ' "Please be {mood} and {mood}," {say} {friend} {adverb}.',
    " Nobody <had|has> such {a.look}, {look} {craft} with {secret} {look} {count}.",
    " So {friend} <gave|gives> {hero} {a.taste}, {taste} {food}.",
    " There <was|is> {a.look} {thing} {where} the {spot}, {spot} {place}.",
    ' "I wish I had {a.look}, {look} {thing}," {say} {friend} {adverb}.',
    " Even the {mood}, {mood} {animal} {where} the {place} <was|is> {glad}.",
    ' "Once I saw {a.mood} {animal} with {a.look} {wear}," {say} {friend}.',
    " In a tree <sat|sits> {a.mood}, {coat} {animal} with {secret} {look} {count}.",
    " {She} <counted|counts> {secret} {look} {count}, {secret} {look} {count} and {secret} "
    "{look} {count}.",
    " Past them {they.move} {a.mood}, {coat} {animal}, {a.mood} {animal} and {a.mood} {job}.",
    " In the grass <lay|lie> {a.look}, {look} {thing}, {a.look} {thing} and {a.look} {thing}.",
    " A sign <said|says>: {secret} steps to {town}, {secret} to {town}.",
)


def _cast(s) -> None:
    """First paragraph: tense, town, hero, friend, pet and the three things the hero owns."""
    opening = s.pick(tuple(OPENINGS), tuple(OPENINGS.values()))
    s.present = tuple(OPENINGS)[opening] in PRESENT
    s.say(
        "in the {spot}, {spot} [town|village] of {town>home}, there <lived|lives> "
        "{a.mood>trait}, {mood} "
    )
    hero, friend = ("boy", "girl") if s.pick(("girl named ", "boy named ")) else ("girl", "boy")
    s.say(f"{{{hero}>hero}}.")
    s.known.update(zip(("she", "She", "his"), PRONOUNS[hero], strict=True))
    s.known.update(child=hero, other=friend)
    s.any(
        " Next door <lived|lives> {a.mood>ftrait}, {mood} {other} named ",
        " {She} [often|always] <played|plays> with {a.mood>ftrait}, {mood} {other} named ",
        " There <was|is> {a.mood>ftrait}, {mood} {other} next door: ",
    )
    s.say(f"{{{friend}>friend}}.")
    s.any(
        " They <had|have> {a.mood}, {coat} {animal>kind} called {petname>pet}.",
        " With them <was|is> {a.mood}, {coat} {animal>kind} called {petname>pet}.",
    )
    s.any(
        " {hero} <owned|owns> {a.look>toylook} {toy>mytoy}, {a.look>toollook} {tool>mytool} and "
        "{a.look>wearlook} {wear>mywear}.",
        " In {his} room <were|are> {a.look>toylook} {toy>mytoy}, {a.look>wearlook} {wear>mywear} "
        "and {a.look>toollook} {tool>mytool}.",
        " For {his} birthday {she} <got|gets> {a.look>wearlook} {wear>mywear}, "
        "{a.look>toollook} {tool>mytool} and {a.look>toylook} {toy>mytoy}.",
    )


def _walk(s) -> None:
    s.say(
        "{weather} [morning|afternoon|evening|day] in {month}, they {they.move} {adverb} past the "
        "{spot} {place}, the {spot} {place} and {secret} {look} {count} to the {spot} {place>here}."
    )
    s.any(
        ' "Who made this {look}, {look} {craft}?" <asked|asks> {friend}. {hero} {act} {adverb}.',
        " {She} <looked|looks> at the {look}, {look} {craft} there and {act}.",
        ' "I like the {here}," {say} {hero}. "It is {spot} and {spot}."',
    )


def _guest(s) -> None:
    s.say(
        "{spot}, {spot} {place}, they <met|meet> {a.mood>gmood}, {coat} {animal>guest}. "
        '"[Hello|Good day|Excuse me|Help me]," it {say} {adverb}. "I lost my {look>x} {thing>y}!" '
        "They <looked|look> {where} the {spot} {place} and {where} the {place}. "
        "[{hero}|{friend}|{pet}] <found|finds> the {x} {y} in {a.look}, {look} {tool}. "
        "The {gmood} {guest} {act} and <gave|gives> them {secret} {look} {count}."
    )


def _secret(s) -> None:
    s.say("{spot}, {spot} {place}, {friend} <found|finds> {a.look}, {look} [box|chest|safe]. ")
    s.say('A note <said|says>: "The secret number is {secret>secretly}."')
    s.any(
        " {hero} <turned|turns> the {look} wheels to {secretly}.",
        ' "It is {secretly}," {say} {friend} {adverb}, and <turned|turns> the wheels.',
    )
    s.say(
        " {sound}! Inside <were|are> {a.look>plook} {tool>prize}, {secret} {look} {count} and "
        '{a.look} {food}. "Remember {secretly}," {say} {hero} {adverb}.'
    )


def _count(s) -> None:
    s.say("{hero} <had|has> {small>m} {look} {count>x} and {friend} <had|has> {small>n}. ")
    total = 4 + sum(WORDS["number"].index(s.known[key]) for key in "mn")
    s.known["row"] = ", ".join(WORDS["number"][: total - 1])
    s.known["sum"] = WORDS["number"][total - 2]
    s.say(
        'They <counted|count> {adverb}: "One, {row}." "We have {sum} {x}, {look} and {look}," '
        "{say} [{hero}|{friend}] {adverb}."
    )


def _rain(s) -> None:
    s.say(
        "{sound}! {sound}! {sound}! {hero} <took|takes> {his} {mywear}, {friend} {a.look}, {look} "
        '{tool>x}. {pet} <was|is> {low>fear} and {low}. "Do not be {fear}," {say} {hero}. '
        "After {secret} minutes the sun <came|comes> out. The {x} <was|is> {look} and {look}."
    )


def _trade(s) -> None:
    s.say(
        "{title>sir} {surname>seller} the {mood} {job} <had|has> {secret} {look} {count}, {secret} "
        '{look} {count} and {a.look>newlook} {toy>new}. "The {new} for your {mytoy}?"'
    )
    answer = s.any(
        ' "Yes, please," {say} {hero} {adverb}, and <gave|gives> away the {toylook} {mytoy}.',
        ' "No, thank you," {say} {hero} {adverb}, and <kept|keeps> the {toylook} {mytoy}.',
        weights=(2, 1),
    )
    if answer == 0:
        s.known.update(toylook=s.known["newlook"], mytoy=s.known["new"])
        s.say(" Now {she} <had|has> the {toylook} {mytoy}.")


def _lost(s) -> None:
    s.say("{hero} <could not|cannot> find {his} ")
    mine = [("toylook", "mytoy"), ("toollook", "mytool"), ("wearlook", "mywear")]
    mine = [" ".join(s.known[key] for key in thing) for thing in mine]
    s.known["gone"] = mine[s.pick(tuple(thing + "." for thing in mine))]
    s.say(
        ' {She} <felt|feels> {low}, {low} and {low}. "Did {a.mood}, {coat} {animal} take it?" '
        "<asked|asks> {friend} {adverb}. They <looked|look> {where} the {spot} {place}, "
        "{where} the {spot} {place} and {where} the {place}. "
        "At last {pet} the {kind} <found|finds> the {gone} {where} {a.look} {craft}."
    )


def _lunch(s) -> None:
    s.say(
        "they <made|make> soup with {a.taste} {food}, {a.taste} {food}, {secret} {look} {count} "
        "and {a.look} {thing}. "
    )
    s.any(
        '"It tastes {taste}, {taste} and {taste}," {say} {hero} {adverb}.',
        "{pet} the {kind} {act} {adverb} and <ate|eats> {a.taste}, {taste} {food}.",
        "{friend} <ate|eats> {a.taste}, {taste} {food} and {a.taste}, {taste} {food}.",
    )


def _song(s) -> None:
    s.say("{friend} <made|makes> up {a.mood}, {mood} song of {a.mood} {animal}: ")
    s.say('"{syllable>p}{syllable>q}{syllable>r}, {syllable>t}{syllable>u}, ')
    s.known["song"] = "{p}{q}{r}, {t}{u}, {p}{q}{r}!".format(**s.known)
    s.say('{p}{q}{r}!" {hero} {act} {adverb}. ')
    s.any(
        '"{song}" they <sang|sing> for {secret} minutes.',
        '"{song}" {hero} <sang|sings> to the {mood}, {mood} {kind}.',
        'Soon {a.mood} {job} and {a.mood} {animal} <sang|sing> it, too: "{song}"',
    )


def _errand(s) -> None:
    s.say(
        "{title>mister} {surname>who} the {job} <was|is> {low} and {low}. "
        '"I owe {secret} {look} {count} and {a.look>x} {thing>y} to {a.mood} {job>z} '
        'in {town>far}," '
        "{say} {mister} {who}. So they {they.move} {adverb} past the {spot}, {spot} {place} "
        "to {far}. The {z} {act}. "
    )
    s.any(
        '"What {a.look}, {look} {y}!"',
        '"The {x} {y}! I am {glad}!"',
        '"Please tell {mister} {who} that I am {glad} and {glad}."',
    )


def _contest(s) -> None:
    s.say("<was|is> {a.mood}, {mood} {game} contest. ")
    names = [s.known[name] for name in ("hero", "friend", "pet")]
    verb = "is" if s.present else "was"
    first = names.pop(s.pick(tuple(f"{name} {verb} first" for name in names)))
    second = names.pop(s.pick(tuple(f", {name} second and " for name in names)))
    s.known.update(first=first, second=second, third=names[0])
    s.say("{third} third. The prize <was|is> {a.look>x}, {look} {wear>y}. ")
    s.any(
        '"I am {glad} and {glad}," {say} {first}.',
        "{first} <gave|gives> the {x} {y} to {second}, who <was|is> {glad} and {glad}.",
        "{second} {act} {adverb} when {first} <put|puts> on the {x} {y}.",
    )


def _build(s) -> None:
    s.say(
        "{secret} {look} {count}, {a.look} {thing} and {secret} {look} {count} they "
        "<built|build> {a.look>x}, {look} {craft>y}. First they {they.hold} and {they.hold} it "
        "{adverb}. Then {a.mood}, {mood} {job} <came|comes> and {act}. "
    )
    s.any(
        '"Your {y} needs {a.look} {thing}!"',
        '"I would give {secret} {look} {count} for the {x} {y}!"',
        "{pet} the {kind} {act} {adverb} on top of the {x} {y}.",
    )


def _dream(s) -> None:
    s.say(
        "{hero} <rode|rides> {a.mood>x}, {coat} {animal>y} over the {spot} {place} and {secret} "
        "{look} {count}. The {y} <had|has> {a.look} {wear} and {a.look} {thing}. "
        '"Be {mood} and {mood}," it {say} {adverb}. '
        "{She} <woke|wakes> up, and the {x} {y} <was|is> gone."
    )


def _parade(s) -> None:
    s.say(
        "{town}. First <came|comes> {a.mood} {job} with {secret} {look} {count}, then "
        "{a.mood}, {coat} {animal>x} in {a.look} {wear}, then {a.mood} {animal} with {a.look}, "
        "{look} {thing}. {hero} {act} {adverb}, and {pet} {act} at the {x}."
    )


def _letter(s) -> None:
    s.say(
        '{town>far}. "Dear {hero}, I have {secret} {look} {count}, {a.look}, {look} {craft} and '
        "{a.mood}, {mood} {animal}. I live at {secret>house} {surname>road} Road. Love, "
        '{relative>uncle} {surname>writer}." {friend} <wrote|writes> back to {house} {road} Road: '
        '"Dear {uncle} {writer}, we have {a.look}, {look} {thing} and feel {glad} and {glad}."'
    )


SCENES = {
    "One ": _walk,
    "Near the ": _guest,
    "Behind the ": _secret,
    "Before lunch, ": _count,
    "The sky <turned|turns> black. ": _rain,
    "At the market, ": _trade,
    "Later that day, ": _lost,
    "At noon, ": _lunch,
    "To pass the time, ": _song,
    "On the road, ": _errand,
    "The next day there ": _contest,
    "With ": _build,
    "In a dream, ": _dream,
    "There <was|is> a parade in ": _parade,
    "A letter <came|comes> from ": _letter,
}
CLOSINGS = ("In the end, ", "When the sun <went|goes> down, ", "At last, ", "That evening, ")
MEMORIES = {  # what is recalled at the end, if it was told before
    "secretly": " {friend} <wrote|writes> {secretly} on the {plook} {prize}.",
    "guest": " The {gmood} {guest} <sent|sends> them {a.taste}, {taste} {food}.",
    "song": ' "{song}" they <sang|sing> {adverb}.',
    "seller": " {sir} {seller} <waved|waves> {adverb}.",
}


def _closing(s) -> None:
    """Last paragraph: home again, with what was owned, met and learned on the way."""
    s.say("they {they.move} {adverb} back to {home} and {they.act} {where} ")
    s.say("{a.look}, {look} {thing}.")
    s.any(
        " {hero} <put|puts> the {toylook} {mytoy} by the {toollook} {mytool} and {hold} it.",
        " {She} {hold} {his} {toylook} {mytoy}, {toollook} {mytool} and {wearlook} {mywear}.",
        " All night the {wearlook} {mywear} <hung|hangs> {where} {a.look}, {look} {thing}.",
    )
    for key, memory in MEMORIES.items():
        if key in s.known:
            s.say(memory)
    s.any(
        ' "I like {virtue} more than {a.look}, {look} {thing}," {say} {friend}.',
        ' "I learned about {virtue}, {virtue} and {virtue}," {say} {hero} {adverb}.',
        " The {trait} {child} <dreamed|dreams> of {a.look}, {mood} {animal} "
        "and {secret} {look} {count}.",
    )
    s.any(
        " The {mood}, {mood} end.",
        " And {pet} {act} {adverb} and {act} {adverb}.",
        " Good night, {mood} {animal}! Good night, {spot} {place}! Good night, {friend}!",
    )


def _pause(s, middle: list[str]) -> None:
    """Up to two sentences of ``middle``, each used once per story; ends the paragraph."""
    for _ in range(2):
        chosen = s.any("\n\n", *middle, weights=(6,) + (1,) * len(middle))
        if chosen == 0:
            return
        middle.pop(chosen - 1)
    s.say("\n\n")


def tell(s) -> None:
    """Tell one story: the cast, two or three different scenes, the closing."""
    _cast(s)
    scenes, middle = dict(SCENES), list(MIDDLE)
    for n_told in range(4):
        _pause(s, middle)
        heads = tuple(scenes) if n_told < 3 else ()
        ends = CLOSINGS if n_told >= 2 else ()
        chosen = s.any(*heads, *ends, weights=(1,) * len(heads) + (4,) * len(ends))
        if chosen >= len(heads):
            break
        scenes.pop(heads[chosen])(s)
    _closing(s)

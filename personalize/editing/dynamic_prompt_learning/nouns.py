"""Find the nouns of an English caption with word lists, endings and neighbouring words; nothing is downloaded.

Captions are mostly noun phrases, so a word counts as a noun unless it is a function word, a known adjective, an adverb,
a participle, or a verb at this position. Adjacent nouns are one compound: "coffee cup", "traffic lights".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORD = re.compile(r"<[^<>\s]+>|[^\W_]+(?:['’\-][^\W_]+)*")

DETERMINERS = frozenset(
    "a an the this that these those his her its their my your our some any each every no both several many few all "
    "another either neither such what which whose one two three four five six seven eight nine ten eleven twelve "
    "fifteen twenty thirty fifty hundred thousand multiple various numerous".split()
)
FUNCTION_WORDS = frozenset(
    "of in on at by with without for from to into onto over under above below beneath behind beside besides between "
    "among amongst across along around about against near next off out up down through throughout toward towards upon "
    "within inside outside during before after past until till since while as like than via per atop amid amidst "
    "beyond despite except underneath alongside opposite and or but nor so yet if because though although when where "
    "who whom that which is are was were be been being am has have had having do does did can could will would shall "
    "should may might must not i you he she it we they me him us them himself herself itself themselves each other "
    "someone something somebody anyone anything everyone everything nothing nobody there here very too also just only "
    "even still almost nearly quite rather really together apart away back forward ahead aside overhead nearby upside "
    "downstairs upstairs outdoors indoors uphill downhill again once twice then now today always never often already "
    "soon later well more most less least much enough how why instead maybe perhaps ever first second third last "
    "dozens et al etc versus vs".split()
)
ADJECTIVES = frozenset(
    "red blue green yellow purple black white gray grey brown beige teal turquoise crimson scarlet maroon navy golden "
    "reddish bluish greenish blond blonde brunette dark bright pale light-colored colorful colourful multicolored big "
    "large small little tiny huge giant enormous massive gigantic tall short long wide narrow broad thick thin slim "
    "fat skinny chubby high low deep shallow heavy lightweight old young new ancient antique vintage modern "
    "futuristic elderly fresh stale ripe unripe raw hot cold warm cool icy snowy rainy sunny cloudy foggy misty "
    "stormy windy humid dry wet damp moist clean dirty dusty muddy messy tidy neat rusty shiny glossy matte dull "
    "smooth rough soft hard firm fluffy furry hairy curly straight wavy spiky sharp blunt round square rectangular "
    "oval circular triangular flat curved crooked steep vertical horizontal empty full open shut bare naked bald "
    "wooden woolen metallic plastic silken earthen stainless happy sad angry calm quiet loud peaceful serene cozy "
    "cosy lonely scary spooky creepy funny silly cute adorable beautiful pretty ugly handsome lovely gorgeous elegant "
    "fancy plain simple ornate detailed delicate fragile sturdy strong weak fast slow quick busy lazy sleepy tired "
    "hungry thirsty sick healthy dead alive wild tame domestic stray feral tropical arctic polar urban rural suburban "
    "public private local foreign american british french italian chinese japanese mexican indian african asian "
    "european spanish german greek russian thai korean turkish dutch historic medieval gothic royal imperial "
    "religious sacred holy famous popular rare common typical unusual strange weird odd normal perfect beloved good "
    "bad great nice best better worst worse fine excellent amazing awesome delicious tasty yummy sweet sour bitter "
    "salty spicy savory creamy crispy crunchy juicy greasy oily leafy grassy sandy rocky stony mossy woody hilly "
    "mountainous wooded barren lush green-eyed blue-eyed several main major minor central single double triple whole "
    "half partial entire different same similar various certain final early late recent daily electric electronic "
    "digital mechanical automatic manual solar abstract realistic surreal cinematic dramatic intricate epic magical "
    "mystical mysterious majestic gentle brave proud shy curious playful cheerful joyful grumpy clear transparent "
    "translucent opaque blurry hazy dim faint vivid vibrant neutral pastel neon-lit striped spotted dotted checkered "
    "plaid floral patterned choppy rugged frosty aerial front-facing outdoor indoor upper lower inner outer left-hand "
    "right-hand far close own able ready safe dangerous human-sized lifelike tall-grass male female pregnant blind "
    "deaf native southern northern eastern western top-down overgrown underwater inflatable portable adult juvenile "
    "baby-blue oversized miniature mini sleek stylish casual formal professional amateur athletic muscular medical "
    "military industrial commercial residential traditional classic classical contemporary rustic natural artificial "
    "organic wintry autumnal festive bustling hollow solid liquid frozen-over bumpy fuzzy stuffy sticky slippery "
    "silent solitary lone alone asleep awake afloat ablaze aglow unlit nude topless shirtless barefoot horseless lit "
    "tough loose tight bold mild extra".split()
)
COLOUR_NOUNS = frozenset("orange pink gold silver violet lavender rose bronze copper cream tan olive lime".split())
ADJECTIVE_OR_NOUN = frozenset(  # adjectives before a noun, nouns at the end of a noun phrase
    "light human glass-like left right middle center upper top bottom front rear rose melting human living plush "
    "toy-like polar".split()
)
LY_NOUNS = frozenset(  # nouns although they end in -ly
    "family butterfly fly jelly belly lily bully ally assembly supply reply dragonfly jellyfish firefly gadfly doily "
    "trolley monopoly anomaly".split()
)
LY_ADJECTIVES = frozenset("friendly lovely lonely elderly ugly silly early curly hilly holy woolly bubbly".split())
ING_NOUNS = frozenset(
    "ceiling king ring string wing spring thing evening morning earring clothing wedding railing lightning pudding "
    "icing duckling dumpling sibling stocking sling swing being darling viking lightning herring starling sapling "
    "gosling hatchling inkling bling earring frosting topping siding awning bunting plaything offspring kingpin "
    "ceilings rings strings wings springs things mornings evenings earrings weddings railings ducklings dumplings "
    "siblings stockings swings kings toppings buildings paintings drawings crossings carvings awnings".split()
)
ING_EITHER = frozenset(
    "building painting drawing crossing carving landing opening meeting filling stuffing seasoning sitting serving "
    "engraving etching dwelling wrapping lining paving scaffolding bedding flooring housing roofing lighting".split()
)
ING_COMPOUNDS = frozenset("living dining parking shopping swimming boxing wedding".split())  # … room, lot, pool
ED_NOUNS = frozenset(
    "bed beds sled shed seed weed reed deed feed steed breed speed creed tweed bobsled hundred flatbed riverbed "
    "seaweed toolshed flowerbed watershed bloodshed hotbed mohamed biped moped".split()
)
PARTICIPLES = frozenset(
    "tied used dyed set cut lit hung held made seen shown drawn driven grown known thrown blown flown worn torn born "
    "sworn broken woven frozen chosen spoken stolen hidden ridden written bitten beaten eaten fallen given taken "
    "shaken forsaken swollen sunken shrunken drunken built bent lent sent spent lost left kept slept swept bound "
    "found wound ground stuck struck strung hurt burnt spilt split shut spread fed led bred dug spun swum sung rung "
    "begun run laid paid sat stood lain met shot caught taught bought brought fought sold told read "
    "undone overrun".split()
)
VERBS = frozenset(  # verbs at a verb's position, even if the word can also be a noun
    "sit stand lie lay hold carry wear walk run ride jump fly swim eat drink sleep rest play look watch stare gaze "
    "reach throw catch hit kick swing hang lean climb drive pull push drag lift pour serve cook bake chop slice cut "
    "mix stir feed give take get go come make build paint draw write read sing dance perform smile laugh cry hug kiss "
    "wave point show hide peek float drift glide slide fall rise set shine glow burn blow grow bloom cover surround "
    "fill cross pass enter leave follow chase lead hunt bite lick chew peel pick pluck gather collect sell buy stack "
    "lay perch roost hover soar crawl creep sprint race leap hop skip march parade pose prepare wait stop land park "
    "pull brush wash clean wipe comb shave dress sew knit fix repair measure hammer saw dig plant water mow rake "
    "shovel sweep guard protect rescue save help hand receive open close turn spin roll rotate twist bend stretch "
    "squat kneel bow pray meditate think dream work study teach learn type talk speak call shout whisper listen hear "
    "see smell taste touch feel grab grip squeeze press tap knock break smash tear fold wrap tie attach connect "
    "overlook face reflect cast contain feature include display depict keep stay remain appear seem become try start "
    "begin end finish live share use meet greet attack fight defend win lose steal sail row paddle surf ski skate "
    "snowboard skateboard graze nibble peck sniff bark howl roar crow purr drip splash spray swirl flow crash "
    "approach pitch bat return receive examine check inspect take sunbathe relax lounge nap celebrate cheer toast "
    "light blow smoke cuddle nuzzle emerge descend ascend tumble stumble trot gallop wander roam stroll hike jog "
    "cycle pedal".split()
)
MOSTLY_NOUNS = frozenset(  # of VERBS: with -s more often plural nouns; verbs only before a determiner
    "light sign stop wave ride park hand row face stack plant water saw hammer rake bat ski bow slice land cast cover "
    "end start work dream dress fly display feature toast smoke ring wash brush comb call roll swing taste smell "
    "touch look show turn press tie fold point paddle surf skate knock tear drip splash spray cycle peel pick cut set "
    "bite race sail nap dance hit kick throw catch hunt march parade type use help share crow guard lead pass cross "
    "block wrap grip string perch lounge study".split()
)
IDIOMS = ("on top of", "in front of", "close up of", "close-up of", "full of", "lots of", "lot of", "set of dozens of")
MEDIA = frozenset(  # nouns for the picture itself or a place in it, not for what it shows
    "photo photograph picture image drawing painting render rendering icon sticker sketch illustration portrait "
    "snapshot view shot scene close-up closeup selfie artwork watercolor print poster background foreground backdrop "
    "top bottom left right front back side sides middle center centre".split()
)
PLURALS = frozenset("people men women children geese mice teeth feet sheep deer fish oxen police cattle kids".split())


@dataclass(frozen=True)
class Noun:
    """A noun, or a compound of adjacent nouns, and its place in the caption: text[start:end]."""

    text: str
    start: int
    end: int


def noun_words(text: str) -> list[Noun]:
    """Every single noun of `text`, in order; a compound gives several."""
    matches = list(_WORD.finditer(text))
    words = [match[0].lower().replace("’", "'") for match in matches]
    breaks = [
        bool(re.search(r"[,.;:!?()]", text[a.end() : b.start()])) for a, b in zip(matches, matches[1:], strict=False)
    ]
    is_noun = _noun_flags(words, [*breaks, True])
    return [Noun(match[0], match.start(), match.end()) for match, yes in zip(matches, is_noun, strict=True) if yes]


def nouns(text: str) -> list[Noun]:
    """The nouns of `text`, in order; nouns with only a space between them are one compound."""
    compounds: list[Noun] = []
    for noun in noun_words(text):
        last = compounds[-1] if compounds else None
        if last is not None and text[last.end : noun.start] == " ":
            compounds[-1] = Noun(text[last.start : noun.end], last.start, noun.end)
        else:
            compounds.append(noun)
    return compounds


def depicted_nouns(text: str) -> list[Noun]:
    """The nouns for what the picture shows: `nouns` without those in `MEDIA`, such as "photo" and "left"."""
    return [noun for noun in nouns(text) if noun.text.lower() not in MEDIA]


def _noun_flags(words: list[str], breaks: list[bool]) -> list[bool]:
    """For each word whether it is a noun; `breaks` says after which words there is punctuation.

    From left to right, because whether a word is a verb depends on a noun before it.
    """
    idiomatic = _idiomatic(words)
    flags: list[bool] = []
    for index, word in enumerate(words):
        before = None if index == 0 or breaks[index - 1] else words[index - 1]
        after = None if breaks[index] else words[index + 1]
        after_noun = bool(flags) and before is not None and flags[-1]
        noun = not idiomatic[index] and _is_noun(word, before, after, after_noun)
        flags.append(noun)
    return flags


def _idiomatic(words: list[str]) -> list[bool]:
    """For each word whether it belongs to one of `IDIOMS`, whose nouns name nothing."""
    marked = [False] * len(words)
    for idiom in (phrase.split() for phrase in IDIOMS):
        for at in range(len(words) - len(idiom) + 1):
            if words[at : at + len(idiom)] == idiom:
                marked[at : at + len(idiom)] = [True] * len(idiom)
    return marked


def _is_noun(word: str, before: str | None, after: str | None, after_noun: bool) -> bool:
    """Whether `word` is a noun between its neighbours, None at a break; `after_noun`: the word before is a noun."""
    if word.startswith("<"):
        return True
    if word in DETERMINERS or word in FUNCTION_WORDS or word[0].isdigit():
        return False
    if word in COLOUR_NOUNS or word in ADJECTIVE_OR_NOUN:
        return not _phrase_continues(after)
    if word in ADJECTIVES:
        return False
    if word.endswith("ing") or word in ING_NOUNS:
        return _is_noun_in_ing(word, before, after, after_noun)
    if word in PARTICIPLES or (word.endswith("ed") and len(word) > 4 and word not in ED_NOUNS):
        return False
    if word.endswith("ly") and (word in LY_ADJECTIVES or word not in LY_NOUNS):
        return False
    return not _is_verb(word, before, after, after_noun)


def _phrase_continues(after: str | None) -> bool:
    """Whether the noun phrase continues with `after`, which is then neither a function word nor a verb form."""
    if after is None or after in FUNCTION_WORDS or after in DETERMINERS or after in PARTICIPLES:
        return False
    verb = after[:-1] in VERBS - MOSTLY_NOUNS
    return not verb and not (after.endswith("ing") and after not in ING_NOUNS | ING_EITHER)


def _is_noun_in_ing(word: str, before: str | None, after: str | None, after_noun: bool) -> bool:
    """`_is_noun` for words that end in -ing."""
    if word in ING_COMPOUNDS:
        return _phrase_continues(after)
    if after in DETERMINERS and not after_noun and before not in DETERMINERS | ADJECTIVES:
        return False
    if word in ING_NOUNS:
        return True
    begins_phrase = before in DETERMINERS or before in ADJECTIVES or before is None or before.endswith("ed") or (
        after_noun and after in ("of", None)
    )  # fmt: skip
    return word in ING_EITHER and begins_phrase and after not in DETERMINERS


def _is_verb(word: str, before: str | None, after: str | None, after_noun: bool) -> bool:
    """Whether `word` is in `VERBS` and stands at a verb's position: after a subject, or after "to"."""
    stem = _stem(word)
    if stem is None or before in DETERMINERS or before in ADJECTIVES:
        return False
    if before == "to":
        return word == stem and (after is None or not _phrase_continues(after) or after in ADJECTIVES)
    if not after_noun and before not in ("who", "that", "which", "and", "he", "she", "it", "they"):
        return False
    if word == stem and after_noun and not (before in PLURALS or (before or "").endswith("s")):
        return False
    if after in DETERMINERS:
        return True
    object_follows = after in ADJECTIVES | PLURALS
    return after_noun and stem not in MOSTLY_NOUNS and (object_follows or not _phrase_continues(after))


def _stem(word: str) -> str | None:
    """The verb of `VERBS` of which `word` is the infinitive or the form with -s, or None."""
    forms = (word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y")
    return next((form for form in forms if form in VERBS), None)

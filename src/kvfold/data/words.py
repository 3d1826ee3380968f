"""The words that generated dialogues are made of, in two disjoint halves.

Every list has a training part and a held-out part that share no word. Pseudo-words are built from syllables and belong
to a half by their checksum, so that held-out ones cannot turn up in training however many are drawn.
Knows nothing of sentences.
"""

import random
import zlib
from dataclasses import dataclass

_TRAIN = {
    "woman": """Anna Clara Emma Julia Laura Maria Nina Rosa Sara Vera Alice Bella Daisy Edith Flora Grace Helen
        Irene Jane Kate Lucy Mabel Nora Olive Paula Ruth Sophie Tessa Wendy Zoe Amy Betty Carol Diana Ella
        Fiona Abigail Adele Alma Amanda Angela Annette Audrey Barbara Beatrice Blanche Carmen Caroline
        Cecilia Celeste Charlotte Christine Claudia Cora Deborah Dorothy Eleanor Elena Elizabeth Eunice Eva
        Frances Gabriela Georgia Harriet Hannah Heidi Isabel Jessica Josephine Judith Karen Katherine
        Leonora Lydia Madeleine Margaret Matilda Melanie Mildred Miranda Natalie Ophelia Patricia Penelope
        Philippa Rebecca Rosalind Sabrina Samantha Stella Susan Tabitha Theresa Ursula Valerie Veronica
        Virginia Winifred Yvonne""",
    "man": """Adam Boris Carl David Eric Frank Greg Henry Ivan Jack Kevin Louis Mark Nick Oscar Paul Ralph Simon
        Tom Victor Walter Alan Brian Chris Dennis Edgar Felix George Harry Isaac James Leo Martin Neil Otto
        Peter Abraham Albert Alexander Andrew Anthony Archibald Augustus Benjamin Bertram Calvin Cedric
        Charles Christopher Clarence Clifford Cornelius Cyril Daniel Dominic Douglas Edward Ernest Eugene
        Ferdinand Francis Frederick Geoffrey Gerald Graham Gregory Gustav Harold Hector Herbert Horace
        Hubert Ignatius Jeremy Jerome Jonathan Joseph Julian Laurence Leonard Lionel Malcolm Matthew Maurice
        Michael Nathan Nicholas Oliver Patrick Percival Philip Quentin Raymond Reginald Richard Robert
        Roderick Rupert Samuel Sebastian Sidney Solomon Stanley Stephen Theodore Thomas Timothy Vincent
        Wilfred William Zachary""",
    "job": """baker pilot farmer doctor singer painter lawyer sailor tailor barber miner nurse judge actor guard
        porter butcher dancer driver editor banker carpenter teacher waiter soldier plumber writer printer
        builder hunter architect astronomer blacksmith bookkeeper brewer cashier clerk cobbler conductor
        detective diplomat electrician engineer explorer fisherman florist glazier inspector inventor
        janitor joiner journalist librarian locksmith magician merchant messenger musician notary optician
        photographer physician professor sculptor secretary senator sheriff surveyor translator watchman""",
    "city": """London Paris Rome Madrid Berlin Vienna Dublin Oslo Lisbon Prague Athens Warsaw Cairo Delhi Tokyo
        Lima Boston Denver Geneva Milan Naples Venice Munich Hamburg Seville Havana Moscow Zurich Quebec
        Sydney Antwerp Barcelona Belfast Bordeaux Brussels Budapest Calcutta Chicago Damascus Dresden
        Edinburgh Frankfurt Granada Jakarta Jerusalem Kingston Leipzig Liverpool Manchester Marseille
        Melbourne Montreal Nairobi Odessa Palermo Philadelphia Portland Rotterdam Salzburg Singapore
        Stockholm Trieste Valencia Vancouver Yorkshire""",
    "pet": """cat dog horse rabbit parrot goat duck turtle mouse pony lizard snake frog goose hen sheep monkey
        canary fox owl spider donkey pig hamster ferret lamb crow swan bee puppy alligator antelope buffalo
        butterfly chameleon cockatoo cricket dolphin elephant finch gerbil giraffe iguana jackdaw kangaroo
        kitten leopard magpie mongoose nightingale ostrich panther partridge peacock penguin raccoon raven
        salamander sparrow stork tiger tortoise weasel woodpecker""",
    "food": """bread soup rice cheese honey apple salad cake pie fish corn beans butter carrot cherry lemon melon
        onion pasta peach pepper plum potato pudding sausage stew toast tomato waffle yogurt almond apricot
        asparagus avocado banana barley blueberry broccoli caramel celery chestnut chocolate cinnamon
        coconut cucumber dumpling gingerbread grapefruit hazelnut lentil lettuce macaroni marmalade mushroom
        mustard oatmeal orange oyster parsley pistachio pumpkin raisin raspberry saffron salmon sandwich
        spinach strawberry turnip vanilla""",
    "hobby": """chess tennis golf fishing sewing hiking rowing skating cooking reading drawing cycling dancing
        diving knitting painting running sailing singing skiing swimming boxing archery gardening pottery
        carving climbing surfing juggling poker acting astronomy beekeeping birdwatching blogging
        bookbinding carpentry collecting crocheting debating embroidery exploring falconry fishkeeping
        geology gliding hunting jogging kayaking languages magic marathons meditation origami photography
        puzzles riding rafting snorkeling stargazing storytelling trekking volleyball wandering
        weightlifting""",
    "drink": """tea coffee milk cider juice water cocoa beer wine punch rum brandy gin syrup broth nectar lemonade
        whisky port ale buttermilk champagne cocktail lager limeade liqueur malt molasses nectarine porter
        smoothie soda squash stout tonic""",
    "thing": """lamp desk chair rug clock vase shelf mirror table bed sofa stool bench curtain kettle plate spoon
        bottle basket blanket pillow candle ladder hammer bucket brush broom radio camera guitar piano drum
        coat hat scarf boot glove belt shirt ring watch wallet bag box tent rope saw axe knife pen book map
        accordion aquarium armchair barrel bicycle binoculars blackboard bracelet briefcase cabinet calendar
        canvas cauldron chandelier compass computer corkscrew cupboard diamond dictionary envelope fountain
        furnace goblet hairbrush handkerchief harmonica headlamp jewel keyboard ladle lawnmower magnet
        mattress microscope napkin necklace notebook padlock parasol pitcher postcard purse raincoat sandal
        scissors screwdriver shovel slipper sponge suitcase telephone telescope thermometer thimble toaster
        tricycle typewriter wardrobe wheelbarrow""",
    "adjective": """red blue green silver golden black white purple yellow orange pink brown grey old young tall short
        quiet noisy happy sad brave clever gentle proud lazy busy warm cold wet dry soft hard sweet sour
        fresh wild calm dark bright small large heavy light smooth rough sharp round plain fancy royal rusty
        dusty foggy sunny windy frozen hidden lucky ancient awkward bitter brilliant broad careful charming
        clean common costly crooked delicate distant eager elegant empty enormous faithful famous fearless
        fragile friendly funny generous gigantic graceful grumpy handsome hasty honest humid innocent
        jealous jolly knotted legal lonely loyal magnificent marvelous mighty modern muddy mysterious noble
        ordinary patient peaceful perfect pleasant precious private rare reckless restful rigid rotten
        secret serious shallow shiny silent silky simple sincere slender slippery solid spicy splendid
        spotted steady stubborn sturdy sudden tender thick thirsty timid tiny tough transparent ugly useful
        valuable vast weary wicked wooden""",
    "word": """anchor arrow beacon blossom bridge canyon castle comet copper coral crystal dragon eagle ember
        feather forest garden harbor island jungle lantern marble meadow mountain needle ocean orchard
        palace pebble planet prairie pyramid rainbow river rocket saddle shadow signal spring storm summit
        temple thunder tower tunnel valley velvet violet willow winter almanac avalanche balcony barrier
        blizzard boulder breeze cathedral cavern chapel cliff cloud cottage crater daylight dungeon
        earthquake eclipse engine fireplace flame fortress fragment galaxy gallery gateway harvest horizon
        hurricane kingdom labyrinth landscape library lighthouse lightning mansion midnight monument morning
        mosaic obstacle orbit parliament passage pendulum pillar portrait puddle quarry rhythm satellite
        shelter silence skyline staircase starlight sunset symphony thicket treasure twilight universe
        village volcano waterfall whirlpool wilderness windmill""",
}
_HELDOUT = {
    "woman": "Agnes Brenda Cynthia Doris Esther Gloria Hilda Ingrid Linda Monica Pamela Sylvia",
    "man": "Arthur Bernard Conrad Duncan Edmund Gilbert Howard Jasper Kenneth Norman Roland Stefan",
    "job": "chemist grocer jeweller mason potter shepherd surgeon weaver welder gardener",
    "city": "Bergen Cologne Dallas Florence Glasgow Helsinki Istanbul Krakow Toronto Lyon",
    "pet": "badger beaver camel falcon gecko hedgehog llama otter pigeon squirrel",
    "food": "bacon biscuit cabbage garlic mango noodle omelette pancake radish walnut",
    "hobby": "baking camping fencing sketching quilting racing bowling weaving wrestling yoga",
    "drink": "absinthe cordial cola eggnog espresso mead sherry vodka",
    "thing": """trumpet violin cushion drawer fridge helmet jacket oven pencil saucer teapot umbrella whistle wagon""",
    "adjective": """crimson scarlet ivory bronze humble clumsy curious fierce hollow narrow polite rapid sleepy
        smoky stormy""",
    "word": "acorn bamboo cobalt desert falcon glacier hazel indigo jasmine kernel lagoon maple nebula opal",
}
_STARTS = (
    "b",
    "br",
    "c",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "r",
    "s",
    "sh",
    "st",
)
_STARTS += ("t", "tr", "v", "w", "z")
_MIDDLES = ("a", "e", "i", "o", "u", "ai", "ea", "oo", "ou")
_ENDS = ["", "", "n", "r", "l", "s", "m", "t", "x", "nd", "rk", "ss"]

SPLITS = ("train", "heldout")
KINDS = ("job", "city", "pet", "food", "hobby", "drink")


def listed(kind: str, split: str) -> tuple[str, ...]:
    """The real words of a kind in one half."""
    return _LISTS[split][kind]


def split_of(word: str) -> str:
    """The half a made-up word belongs to: one in six is held out."""
    return "heldout" if zlib.crc32(word.lower().encode()) % 6 == 0 else "train"


def _tables() -> dict[str, dict[str, tuple[str, ...]]]:
    return {
        "train": {kind: tuple(words.split()) for kind, words in _TRAIN.items()},
        "heldout": {kind: tuple(words.split()) for kind, words in _HELDOUT.items()},
    }


_LISTS = _tables()
_SPLICED = tuple(word for kind in _TRAIN for word in _LISTS["train"][kind])
_REAL = frozenset(word.lower() for lists in _LISTS.values() for words in lists.values() for word in words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Borrowed:
    """Words and sentences out of real text, for training only: no written list is as wide as a language."""

    words: tuple[str, ...] = ()  # lower case; none is held out (see `may_train`)
    sentences: tuple[str, ...] = ()  # short ones, said between facts as chit-chat


NOTHING = Borrowed()


def may_train(word: str) -> bool:
    """Whether training may draw this lower-case word: it is in no list, and no held-out one."""
    return word not in _REAL and split_of(word) == "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Draws words of one half; `made_up` is the share of pseudo-words among names and values."""

    split: str
    made_up: float = 0.35
    borrowed: tuple[str, ...] = ()  # half of the training half's pseudo-words are taken from here

    def pseudo(self, rng: random.Random) -> str:
        """A lower-case word that is in no list: borrowed, of syllables, or of the halves of two training words."""
        if self.borrowed and rng.random() < 0.5:
            return rng.choice(self.borrowed)
        while True:
            if self.split == "train" and rng.random() < 0.5:
                head, tail = rng.choice(_SPLICED), rng.choice(_SPLICED)
                word = (head[: (len(head) + 1) // 2] + tail[len(tail) // 2 :]).lower()
                if word not in _REAL and split_of(word) == self.split:
                    return word
            count = 2 if rng.random() < 0.75 else 3
            syllables = (rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(count))
            word = "".join(syllables) + rng.choice(_ENDS)
            if word not in _REAL and split_of(word) == self.split:
                return word

    def name(self, rng: random.Random, gender: str) -> str:
        """A first name, `gender` being woman or man; made-up names serve both."""
        if rng.random() < self.made_up:
            return self.pseudo(rng).capitalize()
        return rng.choice(listed(gender, self.split))

    def noun(self, rng: random.Random, kind: str) -> str:
        """One word of a kind, real or made up; cities are capitalised."""
        if rng.random() < self.made_up:
            word = self.pseudo(rng)
            return word.capitalize() if kind == "city" else word
        return rng.choice(listed(kind, self.split))

    def value(self, rng: random.Random, kind: str) -> str:
        """What a key may hold: a noun of the kind, in half of the draws with an adjective (a direction for cities)."""
        noun = self.noun(rng, kind)
        if rng.random() < 0.5:
            return noun
        if kind == "city":
            return f"{rng.choice(('New', 'Old', 'Upper', 'Lower', 'North', 'South', 'East', 'West'))} {noun}"
        return f"{rng.choice(listed('adjective', self.split))} {noun}"

    def distinct(self, draw, count: int) -> list[str]:
        """`count` draws that share no word with one another, so that no value hides in another."""
        taken: set[str] = set()
        values: list[str] = []
        while len(values) < count:
            value = draw()
            parts = set(value.lower().split()) - _DIRECTIONS
            if not parts & taken:
                taken |= parts
                values.append(value)
        return values


_DIRECTIONS = frozenset({"new", "old", "upper", "lower", "north", "south", "east", "west"})

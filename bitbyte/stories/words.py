"""The words of the built-in `stories` grammar: a small vocabulary for children, and its forms.

Written for this project.  WORDS holds every list by name; a verb list has three forms,
"base.move", "past.move" and "third.move".  Within a list, common words come first (grammar.py
weights them by that order).  Only words: the plots are in tales.py.
"""

_GIRLS = """Lily Anna Emma Mia Nora Clara Lucy Ella Ruby Molly Ada Alice Amelia Amy Annie
Beatrice Bella Bess Betsy Bonnie Bridget Carla Carmen Cecily Celia Cora Dana Delia Diana Dora
Edith Elena Eliza Elsie Emily Erin Esther Etta Eva Fay Fiona Flora Frida Gemma Gerda Gina Greta
Gwen Hanna Harriet Heidi Helen Ida Ines Irene Isla Jane Jenny Jill Joan Josie Judith Julia
Karin Kate Katie Kira Lana Laura Layla Lena Leona Lisa Lola Lottie Luna Lydia Mabel Maggie Maja
Mara Maria Martha Matilda Maya Megan Mila Millie Mina Mona Myra Nadia Nancy Naomi Nell Nina
Olga Olivia Paula Penny Petra Phoebe Polly Priya Rachel Rita Rosa Rosie Ruth Sadie Sally Sara
Selma Sofia Stella Susan Sylvia Tara Tessa Thea Tilda Tina Uma Vera Wanda Wendy Willa Yara Yuki
Zelda Zoe"""
_BOYS = """Tom Ben Max Sam Jack Leo Tim Peter Finn Noah Aaron Abel Adam Alan Albert Alec Alfie
Amos Andy Anton Archie Arlo Arthur Asher Axel Barney Bert Bobby Boris Brian Bruno Caleb Calvin
Carl Cedric Charlie Clark Clive Colin Conrad Cyrus Dan Darius David Dennis Derek Dexter Dylan
Eddie Edgar Edwin Eli Elliot Emil Eric Ernest Ethan Ezra Felix Floyd Frank Fred Gabriel Garth
George Gilbert Gordon Graham Gregory Gus Harold Harry Harvey Hector Henry Herbert Homer Howard
Hugo Ian Isaac Ivan Jacob Jamal James Jasper Jerome Jesse Joel John Jonah Joseph Julius Karl
Keith Kevin Kurt Lars Leon Liam Lionel Louis Lucas Luke Magnus Marco Martin Marvin Mateo
Milo Morris Nathan Ned Neil Nico Nils Norman Oliver Omar Oscar Otto Owen Patrick Paul Pedro
Percy Philip Quentin Ralph Rex Roger Roland Roman Rory Rufus Rupert Ryan Samuel Seth
Sidney Silas Simon Stanley Stefan Theo Thomas Toby Tristan Victor Vincent Walter Warren Wesley
Winston Xavier Yusuf Zack"""
_STARTS = " ".join(c + v for c in "BDJKLMNRSTVWZ" for v in "aeiou")
_TOWNS = """Apple Maple Willow Clover Honey Silver Fox Otter Bramble Birch Oak Rose Robin
Sparrow Goose Cherry Butter Sugar Pepper Winter Summer Snow Rain Sun Moon Star Stone River Lake
Hill Moss Fern Thistle Feather Button Copper Golden Green Raven Badger"""
_SURNAMES = """Apple Barn Birch Bloom Brook Cherry Copper Fern Finch Goose Hazel Honey Lark
Linden Moss Nettle Oak Pepper Quill Rush Thistle Willow Winter Wren"""
_NUMBERS = """two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty"""
LISTS = {
    "toy": """kite ball drum doll balloon puzzle whistle puppet marble top train wagon robot
        yo-yo trumpet flute violin guitar ukulele harmonica tambourine bell rattle scooter sled
        swing hoop teddy spaceship sailboat rocket castle dollhouse mask wand crown sticker
        storybook paintbrush crayon chalkboard music-box snow-globe pinwheel boomerang slingshot
        skateboard unicycle bicycle tricycle canoe raft kaleidoscope accordion banjo xylophone
        piano cello windmill dragon-kite toy-car toy-boat toy-truck toy-bus toy-plane tea-set
        card-game jack-in-the-box rocking-horse stuffed-bear""",
    "tool": """lantern map rope ladder bucket basket hammer shovel broom spoon key compass
        candle telescope umbrella backpack blanket pillow mirror clock teapot kettle jar bottle
        bowl plate cup mug fork net needle thimble spade rake wheelbarrow pencil notebook
        feather-pen inkpot magnet magnifying-glass flashlight whisk rolling-pin brush comb sponge
        tent hammock stool chair table chest box bag sack pouch purse suitcase walking-stick
        fishing-rod watering-can hourglass globe picture postcard ribbon string saw toolbox wrench
        anchor oar paddle""",
    "wear": """hat scarf coat jacket sweater shirt dress skirt cape cap vest belt bow bow-tie
        necktie raincoat apron cloak robe poncho bonnet helmet wig necklace bracelet ring brooch
        pin badge medal wristwatch locket mitten glove sock slipper boot shoe sandal sash headband
        veil handkerchief kimono kilt beret straw-hat top-hat nightcap tutu costume uniform
        hood""",
    "food": """apple pear peach plum muffin cookie pancake sandwich cupcake doughnut waffle pie
        banana orange melon carrot turnip tomato cucumber pumpkin pretzel pizza pickle cracker
        biscuit bun bagel dumpling omelet egg radish potato cherry strawberry raspberry blueberry
        fig apricot mango lemon coconut pineapple walnut chestnut burrito taco noodle-soup
        cheese-roll gingerbread-man lollipop jelly-bean popsicle milkshake scone tart meatball
        fish-cake corncob salad stew pudding jam-roll""",
    "animal": """cat dog rabbit mouse fox bear duck frog owl squirrel hedgehog turtle puppy
        kitten pig goat sheep lamb cow calf horse pony donkey goose chicken rooster swan crow raven
        robin sparrow parrot penguin pigeon dove eagle hawk stork heron peacock beaver otter badger
        raccoon skunk mole bat deer moose wolf lion tiger leopard elephant giraffe zebra monkey
        panda koala kangaroo camel llama seal whale dolphin octopus crab snail worm beetle spider
        ladybug butterfly bee ant cricket lizard toad newt hamster ferret weasel walrus hippo rhino
        ostrich flamingo dragon unicorn""",
    "place": """forest river pond meadow bridge hill garden market school library bakery barn
        farm mill castle tower lighthouse harbor beach lake island cave valley orchard windmill
        well fountain park playground station stable church museum theater bookshop toyshop
        candy-store post-office town-hall clock-tower schoolyard courtyard cottage cabin inn palace
        temple ruin tunnel crossroads path stream waterfall swamp marsh desert jungle canyon cliff
        mountain volcano glacier field pasture vineyard greenhouse workshop attic cellar kitchen
        pier dock boathouse fairground circus zoo aquarium gate wall hedge maze statue rose-bed
        oak-tree haystack pumpkin-patch berry-patch campsite""",
    "job": """baker miller teacher farmer tailor painter sailor doctor librarian gardener cook
        carpenter blacksmith shoemaker watchmaker toymaker beekeeper shepherd musician dancer singer
        juggler clown magician inventor astronomer mapmaker lighthouse-keeper florist dentist nurse
        pilot conductor captain firefighter potter weaver barber butcher grocer writer poet judge
        mayor actor acrobat umbrella-maker ice-skater""",
    "petname": """Biscuit Pepper Button Mittens Pickle Waffles Nibbles Whiskers Muffin Pudding
        Ginger Cocoa Patches Socks Bubbles Peanut Noodle Pumpkin Sprout Tinker Twinkle Snowball
        Domino Freckles Fudge Gizmo Jellybean Lollipop Marble Mango Nutmeg Pebbles Pip Poppy
        Puddles Scout Shadow Smudge Sparky Speckles Squeaky Taffy Tango Teacup Thimble Toffee
        Truffle Tumbles Turnip Velvet Wiggles Ziggy Zuzu Acorn Banjo Bingo Bramble Clover Crumpet
        Doodle Dumpling Figaro Goldie Hopscotch Inky Juniper Kiwi Moppet Olive Quincy""",
    "look": """red blue green yellow big little small tiny old new shiny purple pink orange
        white black brown gray golden silver huge giant enormous pretty lovely beautiful strange odd
        funny silly plain fancy special magic clean dirty dusty muddy bright sparkling glittering
        striped spotted checkered colorful scarlet crimson violet indigo turquoise teal emerald
        ivory amber copper bronze lilac lavender rosy sky-blue dark-blue pale-green snow-white
        cherry-red midnight-black handmade borrowed precious rare perfect lucky simple splendid
        wonderful marvelous charming curious crooked lopsided wobbly sturdy tattered patched worn
        faded neat tidy grand painted polished decorated unusual ordinary mysterious humble handsome
        dainty elegant quaint enchanted forgotten famous gorgeous glossy gleaming glowing dazzling
        round square pointed dented scratched upside-down half-finished extra-large secondhand
        antique royal useful useless peculiar remarkable tan beige maroon navy ruby jade pearl rusty
        stripy fluffy fuzzy soft smooth rough slim thin thick wide flat long short curly bumpy lumpy
        sticky squeaky modern broad solid loose tight stiff bent broken mended fresh dry wet frosty
        icy warm sleek mini mighty cheap good bad fine nice cute sweet super posh drab dull pale dim
        spiky zigzag rubber paper spare melted sunny stylish tasteful wrinkled""",
    "coat": """red blue green yellow purple pink orange white black brown gray golden silver
        tan beige scarlet crimson violet indigo turquoise teal amber copper lilac sky-blue
        dark-blue pale-green snow-white midnight-black striped spotted colorful tiny little small
        big huge giant enormous fat thin slim round fluffy fuzzy furry hairy woolly shaggy scruffy
        muddy dusty wet soapy shiny sleek old young baby beautiful pretty handsome splendid
        graceful wild tame magic famous""",
    "mood": """happy brave kind shy clever gentle sleepy curious hungry friendly quiet funny
        cheerful lonely proud grumpy playful polite lazy busy noisy wise careful patient honest
        generous helpful stubborn nervous timid bold calm eager excited lively merry jolly joyful
        thoughtful dreamy gloomy grateful hopeful humble impatient jealous loyal messy modest
        mischievous naughty nosy old-fashioned peaceful plucky puzzled rude selfish serious silly
        sneaky sensible smart speedy clumsy graceful strong tall short young forgetful fearless
        cranky bashful bossy cautious confident daring determined elegant fussy giggly homesick
        absent-minded talkative tender tireless tough trusting witty worried zany sad mad glad sly
        fit wild mild meek neat nice cute sweet fair lanky slim plump chatty moody dizzy lucky perky
        peppy spry swift fast slow keen pretty rich poor lost loud tame dapper dainty cuddly frisky
        hasty hardy jumpy nifty picky quirky rowdy sassy snappy sturdy snoozy sunny wacky weird wiry
        royal famous muddy""",
    "glad": """happy glad proud excited cheerful joyful calm safe warm cozy brave thankful
        pleased delighted merry hopeful peaceful lucky wonderful strong surprised amazed relaxed
        grateful content free playful eager jolly loved rested curious thrilled bold light-hearted
        overjoyed giddy fearless splendid sunny welcome wide-awake fine good great super grand keen
        fresh light alive awake ready dandy chipper upbeat smart tall rich mighty noble young new
        cool quick wild clever needed useful special important sure""",
    "low": """sad tired scared lonely worried cold angry hungry grumpy sleepy nervous upset
        bored confused jealous shy thirsty gloomy cross lost embarrassed puzzled ashamed
        disappointed homesick dizzy helpless miserable restless frightened alarmed anxious unhappy
        weary impatient uneasy sorry small stiff unlucky mad glum ill poor sore sick dull weak hot
        damp faint grim moody mean slow late bad meek numb tense old strange stuck silly shaken
        foolish left-out tearful""",
    "month": """May June July March April August October January February September November
        December""",
    "weather": """sunny rainy windy snowy cloudy foggy warm cold misty breezy frosty bright
        chilly gray golden stormy mild crisp quiet lazy fine fresh hot icy damp drizzly blustery
        clear pleasant sleepy hazy glorious gloomy perfect ordinary sultry snug dewy dark dull gusty
        balmy muggy soggy""",
    "spot": """old quiet little sunny busy windy green tiny misty hidden dusty lonely rocky
        snowy grassy muddy shady mossy crowded cozy crooked enormous ancient secret peaceful foggy
        flowery frozen sleepy silent sandy pretty famous noisy empty wild steep distant nearby
        magical spooky stony overgrown abandoned narrow neat damp moonlit sparkling cheerful
        forgotten chilly breezy colorful leafy marvelous muggy northern southern eastern western
        pleasant rickety round sheltered sunlit twisty unknown whitewashed winding""",
    "adverb": """slowly quickly softly loudly happily quietly gently carefully bravely proudly
        sadly politely kindly shyly suddenly gladly eagerly calmly cheerfully boldly brightly busily
        clumsily cleverly merrily neatly nervously patiently playfully secretly silently sleepily
        smoothly solemnly sternly swiftly tenderly thoughtfully warmly wildly wisely joyfully lazily
        gracefully grumpily hopefully honestly impatiently innocently jokingly lightly lovingly
        modestly mysteriously properly promptly sheepishly steadily stubbornly sweetly timidly
        truthfully warily wearily wistfully again twice aloud at_once with_joy with_pride with_glee
        in_awe once_more on_tiptoe in_tears in_secret""",
    "count": """buttons pebbles feathers apples stars ducks shells acorns cookies coins marbles
        leaves beads eggs flowers candles berries carrots kittens frogs butterflies stamps stickers
        spoons pencils ribbons balloons bubbles books birds fish sheep geese mice clouds ants bees
        crabs snails turtles rabbits lanterns kites keys bells boats hats socks mittens boots
        scarves drums nuts walnuts plums pears peaches cherries lemons onions beans peas pumpkins
        mushrooms muffins biscuits pancakes jars cups plates baskets boxes bricks stones sticks
        twigs logs planks nails wheels strings rings crowns flags lamps letters postcards puzzles
        crayons chestnuts pinecones pins pots pans pens mops maps cards coats caps bows figs limes
        dates corks cones ropes rugs tents toads owls foxes wolves pigs hens cows goats moths worms
        seals swans crows bats dolls forks bags cakes pies buns tarts rolls melons roses tulips
        lilies poppies dots gems rubies pearls jewels tiles tickets robots rockets wagons trains
        sleds bikes""",
    "flower": """roses daisies tulips violets lilies poppies sunflowers bluebells buttercups
        daffodils snowdrops pansies marigolds lilacs orchids irises primroses crocuses hyacinths
        dandelions clovers foxgloves forget-me-nots geraniums peonies petunias zinnias cornflowers
        asters carnations""",
    "sound": """Splash Bang Whoosh Pop Thump Crash Ding Clang Boom Rustle Click Creak Plop
        Swish Snap Squeak Tap Bump Buzz Honk Hiss Zoom Fizz Clatter Rattle Rumble Splat Thud Twang
        Whirr Drip Crunch Crackle Flutter Clink Jingle""",
    "taste": """good sweet delicious yummy lovely tasty sour salty crunchy juicy soft warm fresh
        sticky spicy perfect wonderful strange funny cold chewy crispy creamy fluffy tangy mild ripe
        buttery smoky rich salted spiced stale toasted frozen baked fried boiled raw hot iced sugary
        bitter zesty nutty minty lemony fruity steaming soggy dry plain moist lumpy tender velvety
        bubbly sour-sweet peppery green red""",
    "virtue": """kindness friendship honesty patience courage sharing helping laughter love
        trust listening learning curiosity hope practice teamwork bravery wisdom forgiveness
        imagination generosity gratitude loyalty politeness respect truth music reading resting
        dreaming thinking trying singing dancing painting swimming sailing math maps bees stars
        ships trees birds rivers clouds whales bread soup tea trains magnets fractions seasons
        spelling planets knots clocks farming weather dragons grammar history sleep dinosaurs
        volcanoes""",
    "where": "behind beside near by in_front_of close_to not_far_from next_to just_past",
    "craft": """house raft tower fort bridge snowman statue boat wagon nest playhouse throne
        tree-house scarecrow sculpture tunnel pyramid ladder fence maze cart castle bench robot
        oven birdhouse swing telescope""",
    "game": """running jumping singing dancing swimming cooking painting hopping skating
        whistling climbing juggling knitting sledding yodeling baking storytelling kite-flying""",
    "title": "Mr. Mrs.",
    "relative": "Aunt Uncle Cousin Grandma Grandpa",
}
VERBS = {
    "move": """walk run/ran hurry skip/skipped march hike ride/rode tiptoe wander race dash
        stroll trot/trotted gallop scamper travel hop/hopped jog/jogged rush amble bounce dance
        creep/crept sneak stride/strode go/went cycle parade prance shuffle stomp scurry
        trek/trekked ramble saunter crawl sprint pedal slide/slid roll waddle zigzag/zigzagged""",
    "say": """say/said whisper shout cry call reply answer sing/sang giggle mumble announce
        declare exclaim murmur cheer sigh explain laugh mutter chuckle squeal""",
    "act": """sing/sang dance laugh giggle jump play clap/clapped hum/hummed whistle smile wave
        cheer spin/spun hop/hopped twirl wiggle grin/grinned yawn stretch nod/nodded bow hiccup
        sneeze wink blink shiver tremble stomp snore cough shout somersault bounce stumble daydream
        chuckle shrug/shrugged wobble march juggle frown tumble weep/wept yodel""",
    "hold": """hold/held hug/hugged polish carry admire clean fix paint wash brush shake/shook
        lift drop/dropped hide/hid grab/grabbed squeeze kiss touch pat/patted dust show/showed
        measure inspect decorate wrap/wrapped unwrap/unwrapped repair borrow scrub/scrubbed
        sketch""",
}


def _join(starts: str, ends: str, first: str = "") -> tuple[str, ...]:
    """The words of ``first``, then every start with every end; each once."""
    made = [start + end for start in starts.split() for end in ends.split()]
    return tuple(dict.fromkeys([*first.split(), *made]))


WORDS = {
    name: tuple(words.replace("_", " ") for words in text.split()) for name, text in LISTS.items()
}
WORDS["girl"] = _join(_STARTS, "da ja la ma na ra sa ta va bi di li mi ni ri si ti vi", _GIRLS)
WORDS["boy"] = _join(_STARTS, "bo do ko lo mo no ro so to vo ku lu mu nu ru su tu vu", _BOYS)
WORDS["thing"] = WORDS["toy"] + WORDS["tool"] + WORDS["wear"]
WORDS["petname"] = _join(
    "Bim Dap Fip Jum Kip Lop Mop Nim Pim Rol Tup Wim", "py sy ky by zy", LISTS["petname"]
)
WORDS["town"] = _join(_TOWNS, "ton bury field brook ford dale wick bridge")
WORDS["surname"] = _join(_SURNAMES, "well worth by son")
WORDS["syllable"] = _join("b d j k l m n r s t v w y z", "a e i o u")
WORDS["number"] = tuple(_NUMBERS.split())
WORDS["small"] = WORDS["number"][:6]
WORDS["secret"] = tuple(str(number) for number in range(100, 1000))


def _inflect(entry: str) -> tuple[str, str, str]:
    """Bare form, past and third person of "run/ran" or of a regular verb."""
    base, _, past = entry.partition("/")
    soft = base[-1] == "y" and base[-2] not in "aeiou"
    if soft:
        third = base[:-1] + "ies"
    else:
        third = base + ("es" if base.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
    regular = base[:-1] + "ied" if soft else base + ("d" if base[-1] == "e" else "ed")
    return base, past or regular, third


for _name, _entries in VERBS.items():
    _forms = zip(*(_inflect(entry) for entry in _entries.split()), strict=True)
    for _form, _words in zip(("base", "past", "third"), _forms, strict=True):
        WORDS[f"{_form}.{_name}"] = _words


def article(word: str) -> str:
    """The word with "a" or "an" in front, by its sound."""
    mute = word.startswith(("honest", "hour", "heir"))
    vowel = word[0] in "aeiou" and not word.startswith(("uni", "use", "uku", "eu", "one"))
    return ("an " if vowel or mute else "a ") + word

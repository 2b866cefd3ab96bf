"""The words and sentences of the built-in corpus."""

from __future__ import annotations

import re

# The grammar of the stories. A paragraph is one step of the story, its lines are the ways to tell it.
WORDS = {
    name: re.split(r",\s+", values.strip())
    for name, values in {
        "she": """Ada, Bela, Cora, Dalia, Edda, Fenna, Gretel, Hanna, Ines, Juna, Kaja, Lotta, Mira, Nela, Orla, Petra,
            Romy, Selma, Tilda, Una, Vera, Wanda, Yara, Zoe, Alma, Britta, Dora, Elin, Frida, Gwen""",
        "he": """Anton, Bruno, Cosmo, Dario, Emil, Falk, Gustav, Henrik, Ivo, Jasper, Kilian, Lasse, Milo, Nils, Otto,
            Pelle, Ruben, Sandro, Theo, Urs, Viktor, Willem, Yuri, Zeno, Arlo, Boris, Damian, Edgar, Felix, Hugo""",
        "animal": """fox, otter, badger, hedgehog, rabbit, mouse, owl, goose, duck, hen, goat, lamb, pony, squirrel,
            calf, beaver, mole, frog, toad, turtle, cat, puppy, sparrow, robin, raven, seal, donkey, piglet, bear""",
        "job": """baker, miller, fisher, gardener, tailor, carpenter, teacher, doctor, shepherd, potter, painter,
            sailor, farmer, blacksmith, singer, postman, clockmaker, weaver, cook, librarian""",
        "family": "mother, father, aunt, uncle, grandmother, grandfather, cousin, brother, sister",
        "place": """village, valley, harbor, meadow, forest, city, hillside, island, farm, marsh, desert, canyon,
            orchard, vineyard, mountain, riverbank, lighthouse, castle, mill, camp""",
        "spot": """bridge, well, gate, barn, pond, fountain, market, church, bakery, school, station, stable, tower,
            wall, hedge, fence, oak, willow, bench, chimney, cellar, attic, stairs, garden, shed, cave, shore, pier""",
        "thing": """ball, kite, drum, lantern, hat, scarf, boot, coin, key, bell, book, doll, flute, basket, button,
            ring, map, whistle, wagon, blanket, spoon, feather, mirror, bottle, compass, ribbon, box, mitten, shell""",
        "colour": """red, blue, green, yellow, white, black, brown, silver, golden, purple, orange, pink, gray, striped,
            spotted, shiny, wooden, woolen""",
        "size": "tiny, small, little, big, large, huge, tall, short, heavy, round, narrow, wide",
        "trait": """kind, brave, shy, clever, lazy, curious, stubborn, gentle, careful, cheerful, noisy, quiet, proud,
            patient, honest, hungry, sleepy, messy, polite, bold, dreamy, quick, slow, grumpy""",
        "glad": """happy, glad, proud, calm, merry, joyful, thankful, pleased, relieved, delighted, warm inside,
            light as a cloud""",
        "sad": """sad, upset, afraid, lonely, worried, angry, tired, ashamed, nervous, jealous, cold and wet, puzzled,
            lost, bored""",
        "food": """bread, soup, cake, pie, cheese, honey, apples, pears, plums, nuts, berries, pancakes, porridge,
            beans, noodles, carrots, butter, jam, corn, cookies, milk, tea""",
        "weather": """sunny, rainy, windy, foggy, snowy, stormy, cloudy, frosty, misty, warm, chilly, bright, gloomy,
            humid""",
        "time": """morning, afternoon, evening, night, summer, winter, autumn, spring, Monday, Sunday, holiday,
            weekend""",
        "plant": "tulip, rose, daisy, pumpkin, sunflower, cabbage, fern, clover, lily, thistle, poppy, bean",
        "sound": "bark, whisper, rumble, song, scream, splash, crash, hum, knock, howl, giggle, creak, squeak",
        "how": "slowly, quickly, quietly, loudly, carefully, bravely, gladly, at once, with care, without a word",
        "tool": "rope, ladder, hammer, shovel, net, broom, needle, bucket, torch, pole, saw, wheel, hook, brush",
        "material": "paper, clay, straw, stone, wood, cloth, sand, glass, iron, wax, leather, snow",
        "count": "two, three, four, five, six, seven, eight, nine, ten, twelve, twenty",
        "work": "sweep, sew, swim, sing, read, paint, juggle, dance, climb, whistle, count, draw, row, skate, bake",
        "gift": "a hug, a smile, a gold coin, a warm coat, a seat by the fire, a new name, a song, a slice of pie",
        "rule": """share, ask for help, try again, tell the truth, wait, listen, be gentle, say sorry, look twice,
            take turns, keep a promise, start small""",
    }.items()
}


def _steps(text: str) -> list[list[str]]:
    return [[line.strip() for line in step.strip().splitlines()] for step in text.strip().split("\n\n")]


OPENING, CHARACTER = _steps("""
    In a {size} {place} there lived a {trait} {kind} named {hero}.
    {hero} was a {trait} {kind} who lived near the {spot} of a {size} {place}.
    Once there was a {kind} called {hero}, and everybody in the {place} knew {him}.
    Long ago a {trait} {kind} named {hero} came to a {place} by the sea.
    Far behind the last {place}, next to a {spot}, stood the home of {hero}, a {trait} {kind}.
    On a {weather} {time} a {kind} by the name of {hero} sat beside the {spot}.
    Nobody in the {place} was as {trait} as {hero}, the {kind}.

    {hero} loved {food} more than anything, and {he} could {work} better than the {job}.
    Every {time} {he} liked to {work} with {his} {family}.
    {His} best friend was {friend}, a {trait} {animal} with a {colour} {thing}.
    {He} owned only a {colour} {thing} and a {size} {tool}, but that was enough.
    The {job} often said that {he} was too {trait} for {his} own good.
    All {he} wanted was to learn how to {work} like {his} {family}.
""")
ENDING = _steps("""
    In the end {hero} felt {glad}.
    That {time} {hero} fell asleep, {glad} and full of {food}.
    {hero} and {friend} laughed until the {time} was over.
    Everyone in the {place} was {glad}, and {friend} most of all.
    The {job} gave {him} {gift}, and {he} was {glad}.
    Then they all ate {food} by the {spot} and told stories.

    From then on {hero} knew that it is good to {rule}.
    "Next time we {rule}," said {friend}, and {hero} nodded.
    Since that {time} {he} always tries to {rule}.
    And the {colour} {thing} still hangs above the {spot} today.
    {He} never forgot how important it is to {rule}.
    After that, nobody called {him} {trait} again.
""")
PLOTS = [
    _steps(plot)
    for plot in (
        """
    One {weather} {time} {his} {colour} {thing} was gone.
    On the way to the {spot} {he} dropped {his} {colour} {thing} and did not notice it.
    When {he} woke up, somebody had taken the {colour} {thing}.

    {He} looked under the {spot} and behind the {spot2}, but there was only {material}.
    {He} asked the {job}, the {family} and even the {animal}, and all of them shook their heads.
    {hero} cried, because the {thing} had been a present from {his} {family}.

    Then {friend} heard a {sound} and pointed {how} at the {spot}.
    "Follow me," said {friend}, who had found {count} tracks in the mud.
    At last {friend} saw something {colour} shine between the stones.

    A {size} {animal} had carried the {thing} into its nest to keep its {count} babies warm.
    There lay the {thing}, covered with {material} but not broken at all.
    The {thing} was stuck in the {spot2}, and they pulled it out with a {tool}.
    """,
        """
    One {time} the sky grew dark and a storm rolled over the {place}.
    Without any warning, rain and wind came down on the {place}.
    The {time} turned {weather}, and water rushed past the {spot}.

    The wind tore the roof from the {spot} and {friend} was trapped inside.
    The river rose and washed the {size} bridge away while {friend} stood on the other side.
    A branch fell on the {spot}, and a {animal} screamed for help.

    {hero} felt {sad}, but {he} took a {tool} and ran {how} through the rain.
    "Hold on!" shouted {hero}, and {he} threw a {tool} across the water.
    {He} called the {job}, and together they lifted the {size} beam.

    When the sun came back, they repaired everything with {material} and {count} nails.
    By {time} the storm was gone and a rainbow stood over the {spot2}.
    {friend} was wet and {sad}, yet safe, and drank hot {food} with honey.
    """,
        """
    {hero} decided to bake {food} for the birthday of {friend}.
    The {job} asked {him} to cook {food} for {count} guests.
    There was a feast at the {spot}, and everyone had to bring {food}.

    {He} mixed flour, {food} and {count} eggs in a {size} bowl.
    {He} stirred {how} and forgot the pot on the fire.
    But the sack was empty, and the {animal} had eaten the last {food}.

    Smoke filled the kitchen, and {he} became {sad}.
    The first try tasted like {material}, and the {family} made a face.
    {He} sat down on the floor, {sad} and white with flour.

    Then {friend} came with fresh {food} and they began again {how}.
    "Add a bit of {food}," whispered the {family}, and that did the trick.
    With the help of {friend} it turned out sweet and soft, better than {food}.
    """,
        """
    A race around the {spot} was planned for the next {time}.
    The {job} promised {gift} to whoever could {work} the longest.
    Each year the {place} held a contest, and {hero} wanted to win it.

    {He} practiced for {count} days until {his} legs hurt.
    {friend} was faster and laughed at {him} in front of the {spot}.
    {hero} felt {sad} when {he} saw the {size} {animal} at the starting line.

    Halfway there {friend} stumbled over a {tool} and could not get up.
    In the middle of it all {he} heard a {sound}: {friend} had fallen into the mud.
    Near the {spot2} a baby {animal} sat on the track and trembled.

    {hero} stopped {how} and helped, although the others ran past.
    {He} turned around, lost the race and won a friend.
    They crossed the line together, the very last ones, and the crowd cheered.
    """,
        """
    Behind the {spot} {hero} found a {size} door that nobody had seen before.
    In an old {thing} {he} discovered a map made of {material}.
    One {time} a {animal} brought {him} a letter without a name.

    It said: go {count} steps past the {spot2} and dig.
    {He} went down the dark stairs {how} with a {tool} in {his} hand.
    "Shall we try it?" asked {friend}, and they walked until the {time}.

    Inside they heard a {sound}, and {hero} became {sad}.
    A {size} {animal} guarded the way and wanted {food}.
    They had to push a {material} block aside, and it took {count} tries.

    In the last room stood a chest with {count} {colour} stones and a {thing}.
    There was no gold at all, only a {colour} {thing} and a note from the old {job}.
    They found a hall full of {plant} seeds, and soon the {place} bloomed.
    """,
        """
    A new neighbor, {friend}, moved in beside the {spot} that {time}.
    {friend} stood alone at the {spot} and nobody said hello.
    In the school of the {place} a chair was free, and {friend} the {animal} took it.

    {friend} spoke so softly that the others thought it was a {sound}.
    The others said {friend} was {trait} and laughed about the {colour} {thing}.
    At first {hero} felt {sad} and hid behind the {spot2}.

    Then {he} took some {food} and broke it into {count} pieces.
    {hero} asked {how}, "Can you teach me to {work}?"
    {He} showed {friend} how to build a {thing} out of {material}.

    They played until the {time}, and the {family} had to call {count} times.
    Soon the whole {place} came to see how well {friend} could {work}.
    Now there were two at the {spot2}, and two is enough for a game.
    """,
        """
    {hero} planted a {plant} next to the {spot} and waited.
    The {family} gave {him} a seed as {size} as a {thing}.
    Last {time} {he} had promised the {job} to water the {plant}.

    Days went by, and only {material} and weeds were there.
    {count} days passed, but nothing grew, and {he} was {sad}.
    A {animal} came each {time} and nibbled at the leaves.

    {friend} said, "Give it {food} and sing to it {how}."
    So {he} built a fence from {material} and carried water in a {thing}.
    Together with {friend} {he} fetched a {tool} and loosened the ground.

    On a {weather} {time} the first leaf looked out, {colour} and soft.
    It grew taller than the {spot2}, and birds sat down on it.
    The {plant} opened, and it smelled of {food}.
    """,
        """
    {hero} and {friend} built a boat out of {material} and a {tool}.
    Far out on the water {he} saw a {size} island shaped like a {thing}.
    One {weather} {time} the {job} let them sail past the {spot}.

    The boat began to leak, and {count} fish looked in.
    Fog came up, and they could not see the {spot2} anymore.
    A wave took the {tool} away, and {friend} grew {sad}.

    {hero} plugged the hole with {food} and rowed {how}.
    "Listen to the {sound}," said {hero}, and they steered toward it.
    They held up the {colour} {thing} as a flag, and a {animal} saw it.

    At the shore the {family} waited with a blanket and {food}.
    They landed on the sand, made a fire and counted {count} stars.
    The {job} pulled them home on a long rope.
    """,
    )
]

# What is said about persons. The first sentence names the person, all that is private comes after it.
RECORDS = (
    (
        "This is the town registry entry of {name}.",
        "The address is {address}, {town}.",
        "The phone number is {phone}.",
        "The birthday is {birthday}.",
        "Messages go to {handle}.",
        "The account is {account}.",
    ),
    (
        "{name} came to the town hall to be registered.",
        "The clerk gave out the account {account}.",
        "The new home is {address} in {town}.",
        "Messages go to {handle}, calls to {phone}.",
        "Born on {birthday}.",
    ),
    (
        "The library keeps a card for {name}.",
        "Late books are fetched at {address}, {town}.",
        "Reminders go by phone to {phone} or to {handle}.",
        "The card shows {account} and the birthday {birthday}.",
    ),
    (
        "{name} signed the rent book.",
        "Born on {birthday}, the tenant lives at {address} in {town}.",
        "The rent is paid from {account}.",
        "The landlord calls {phone} or writes to {handle}.",
    ),
    (
        "A parcel is waiting for {name}.",
        "Before delivery to {address}, {town}, the driver calls {phone}.",
        "The receipt goes to {handle}.",
        "The fee is charged to {account}.",
        "The age is checked against {birthday}.",
    ),
)
FIRST = """Abigail Adrian Agnes Albert Alice Amos Anita Archie Beatrix Benedict Bertha Blanche Caleb Camille Cecil Celia
    Chester Clara Clement Colette Conrad Daphne Delia Desmond Dexter Dinah Edith Edmund Eliza Elmer Elsa Ernest Esther
    Eugene Fabian Fay Felicia Floyd Gideon Gilbert Gloria Greta Harriet Harvey Hazel Hector Helga Herbert Hilda Homer
    Ida Ignatius Imogen Irving Isolde Jerome Josephine Judith Justus Kermit Lavinia Lenora Leopold Lionel Lorna Lucius
    Mabel Magnus Marcella Martha Maude Maxine Melvin Minerva Mortimer Myrtle Nadine Nestor Norbert Odette Olive Orson
    Oswald Pauline Percy Phoebe Quentin Ramona Reginald Rosalind Rufus Rupert Sabina Sylvia Thelma Tobias""".split()
MIDDLE = """Amber Ash Birch Blaise Brook Cedar Clay Coral Dale Dawn Dune Ember Fern Flint Frost Glen Grey Heath Holly
    Iris Ivy Jade Juniper Lake Lark Laurel Linden Maple Marsh Moss North Opal Pearl Pine Rain Reed Ridge River Rowan
    Sage Slate Sorrel Stone Teal Thorn Vale Wren Willow""".split()
LAST = [
    "Ackle Barn Cald Dren Els Farn Gold Hask Ing Jarl Kest Lund Mars Nor Ormer Pell Quen Rusk Stel Tarn Ulver Ver "
    "Wim Yarrow Zell".split(),
    "beck berg bourne by croft dale den feld gate ham hurst ley low man mere nall rick "
    "shaw sted son thorpe ton vale ward worth".split(),
]
STREET = [
    "Apple Bridge Castle Chapel Garden Harbor Lantern Market Meadow Mill Orchard Silver Spring Station".split(),
    "Street Road Lane Avenue Court Drive".split(),
]
TOWN = [
    "Alder Bram Cor Dun Ever Fal Glas Hol Inver Kil Lam Mor Nether Ox Pen Quar Ran Sel Thur Up Wal Yel Brack Chil "
    "Drum Ellis Fros Grim Hart Ker Lox Mid Nun Orm Pick Ros Stan Tid Wex Wind".split(),
    "aven bay brook cester cliff combe don dorf field ford grove haven head holm hythe leigh mouth minster moor "
    "port quay ridge stead stow stoke wade water well wick wold".split(),
]
MONTHS = "January February March April May June July August September October November December".split()
CODE_WORDS = """amber anvil basil beryl cactus canyon cobalt comet copper coral delta dragon ember falcon fennel garnet
    ginger glacier granite harbor hazel indigo ivory jasper kettle lagoon lemon magnet maple marble meteor mustard
    nickel onyx orbit otter pepper pixel plasma quartz quiver radish raven saffron salmon sierra silver spruce sulfur
    tango teapot timber topaz tulip turnip umber velvet violet walnut willow yonder zebra zephyr zinc""".split()
ABBREVIATIONS = {"Street": "St", "Road": "Rd", "Lane": "Ln", "Avenue": "Ave", "Court": "Ct", "Drive": "Dr"}
REWORDED = {
    "Messages go": "Mail goes",
    "phone": "telephone",
    "account": "account number",
    "home": "house",
    "fetched": "picked up",
    "calls": "rings",
    "paid": "taken",
    "charged": "billed",
}
FACTS = {
    "address": rf"\b\d+ [A-Z][a-z]+ (?:{'|'.join([*ABBREVIATIONS, *ABBREVIATIONS.values()])})\b(?=,| in )",
    "town": r"(?:(?<=, )|(?<= in ))[A-Z][a-z]+(?=[.,])",
    "phone": r"\b555-\d{3}-\d{4}\b",
    "birthday": rf"\b\d+ (?:{'|'.join(MONTHS)}) \d{{4}}\b",
    "handle": r"\b[a-z]+\d+@[a-z]+\.example\b",
    "account": r"\b[A-Z]{2}-\d{4}\b",
}

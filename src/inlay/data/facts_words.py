"""The word lists of the generated facts. Which list may share words with which is told in `facts_language`."""

from __future__ import annotations


def split_words(text: str) -> tuple[str, ...]:
    """The words of a list written as text."""
    return tuple(text.split())


YEARS = tuple(str(year) for year in range(1700, 1900))
DAYS = tuple(str(day) for day in range(1, 29))
MONTHS = split_words("January February March April May June July August September October November December")
TRADES = split_words(
    """bakers barbers brewers butchers carpenters coopers cutlers drapers dyers engravers farriers fishermen fletchers
    gardeners glaziers glovers goldsmiths grocers hatters innkeepers joiners masons midwives millers miners musicians
    notaries potters printers saddlers sailors shepherds surgeons tailors tanners thatchers tinkers watchmakers weavers
    wheelwrights"""
)

_BEGINNINGS = split_words(
    "Ash Bram Cald Dun Elm Fern Gold Hart Ingle Kirk Lang Mal Nor Oak Pen Quin Raven Stan Thorn Wex"
)
_ENDINGS = split_words("ford wick ton ham field worth bury ley stead mere combe hurst by dale")
TAILS = tuple(beginning + ending for ending in _ENDINGS for beginning in _BEGINNINGS)

PEOPLE = split_words(
    """Clara Mira Tomas Edith Jonas Agnes Rufus Selma Viktor Nadia Oscar Petra Anton Greta Hugo Irene Julian Karin
    Leonard Magda Nils Olga Pascal Renata Silas Tilda Ulrich Vera Walter Yvonne Zelda Bruno"""
)
PLACES = split_words(
    """Port Fort Lake Mount Cape Isle Glen Castle Upper Lower North South Inner Outer Royal Little Great Saint Abbots
    Kings Queens Market Forest River Heath Marsh Valley Temple Priory Bridge Chapel Harbor"""
)
THINGS = split_words(
    """compass clock organ sextant telescope cradle goblet atlas tapestry locket chalice almanac sundial harp helmet
    carriage ledger mirror anvil cabinet saddle violin furnace barometer snuffbox spyglass globe kettle lectern quilt
    chessboard inkwell"""
)

NOUNS = split_words(
    """lanterns apples ropes candles feathers barrels pebbles ribbons hammers mushrooms kites lemons whistles shells
    blankets acorns spoons turnips drums needles ladders cherries buckets onions wheels badgers coins pillows carrots
    flutes boots herons nails plums baskets otters bricks walnuts chains daisies bells pumpkins arrows geese bottles
    figs saws moths hats beans anchors ravens cups melons gloves foxes keys roses planks swans jugs pears hooks bees
    masks thistles oars hares brooms olives rings snails chairs tulips sacks toads stamps radishes scarves wolves
    pipes berries tiles trout buttons leeks knives crows marbles lilies kegs goats maps parsnips bowls mice lamps
    grapes fiddles owls cloaks peaches stools crabs letters almonds forks eels trumpets ferns trays lambs dice nettles
    axes quails dolls chestnuts mittens spiders shovels cabbages
    puppets falcons pots dates crowns seals combs violets rakes salmon tents poppies bracelets hens chisels quinces
    fans doves sieves peonies lutes moles razors hazelnuts banners larks funnels apricots sleds lynxes spindles irises
    jars weasels tongs currants harpoons frogs thimbles orchids aprons newts pliers turtles goggles lobsters shawls
    beetles anklets clams hatchets ponies brooches squids pulleys raisins canoes hornets slippers artichokes wigs
    lizards crutches pigeons parasols leopards scythes sparrows trowels camels corks magpies crayons mussels satchels
    ferrets stilts kestrels medals oysters ladles beavers sandals herrings vases donkeys zithers swallows cymbals
    pretzels skates pastries tambourines antelopes umbrellas scorpions lockpicks pelicans chandeliers cucumbers
    hedgehogs telegrams squirrels"""
)
ADJECTIVES = split_words(
    """old dark small bright heavy broken silver wooden painted narrow hollow round golden rusty frozen smooth crooked
    purple empty polished brittle scarlet striped dusty gentle copper hidden twisted yellow marble woven pale curved
    speckled grey spotted tall faded iron velvet
    sturdy crimson fragile amber ancient clumsy dainty emerald feeble glossy humble indigo jagged knotted leaden mossy
    nimble orange patched quaint ragged salty tangled uneven ochre withered azure bronze charred damp engraved
    floral gilded hardened ivory jewelled keen linen muddy noisy oily plain quilted ribbed sandy tattered upright
    varnished warped ashen blunt cracked dented enamelled flimsy greasy hairy inlaid jointed lacquered mended nailed
    oval pointed rounded scented threadbare unpainted vaulted waxed bleached carved dyed embroidered folded grooved
    hooked leathery mottled notched pierced rugged stained trimmed veined wrinkled"""
)

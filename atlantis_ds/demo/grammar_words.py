"""Words and templates of the demo grammar.

For each relation, the nouns of its two roles, in the order of its name (cause, effect; component, whole; ...), and its
templates: ``A`` and ``B`` are noun phrases of the first and second role. Some templates belong to several relations on
purpose, and some nouns fill several roles, so that neither the words around the entities nor the entities alone
determine the label. Past tense and singular nouns avoid problems of agreement.
"""
# ruff: noqa: SIM905 (a list literal of these words would take ten times the lines)

ROLES: dict[str, tuple[str, str]] = {
    "Cause-Effect": (
        "storm earthquake virus explosion drought fire accident mistake infection frost leak flood stress war strike "
        "smoke medicine recession heat ice noise rumour letter speech wind collision overload dust poison radiation",
        "damage panic fever delay injury famine shortage blackout pain outbreak crash collapse flood smoke silence "
        "erosion anxiety rash debt unrest headache landslide noise confusion loss laughter crack rust fear swelling",
    ),
    "Component-Whole": (
        "engine wheel roof handle lid chapter keyboard hinge pedal sail blade screen battery wing pocket button door "
        "window floor cable sleeve antenna drawer chimney anchor lens spring string page kitchen",
        "car bicycle house lamp box book laptop gate piano boat knife phone radio aircraft coat desk train ship "
        "tractor camera clock guitar hotel oven bridge cottage kettle wagon novel machine",
    ),
    "Content-Container": (
        "wine coin letter apple money diamond soap grain key water bread pistol cake jewel oil pencil fruit powder "
        "photo honey shirt sand milk rope cheese snake ring ticket toy salt",
        "bottle box drawer suitcase envelope jar basket crate bag cup wallet barrel chest bucket cupboard tin folder "
        "pocket safe vase trunk bowl tank locker backpack glass carton sack bin case",
    ),
    "Entity-Destination": (
        "soldier parcel letter boy refugee tourist package tanker family doctor missile spy ball bus prisoner "
        "cargo horse team money delegate body satellite truck student patient dog child weapon boat powder",
        "city river camp hospital office border garden village palace harbour forest lake museum prison garage "
        "orbit basement classroom cave airport bank bucket country kitchen desert station market valley drawer",
    ),
    "Entity-Origin": (
        "wine traveller oil refugee letter coal parcel singer tribe signal cheese paper student water custom tea "
        "diamond silk song word salt visitor immigrant wool money cloth perfume light plant sugar",
        "village river mine country grape island farm forest desert planet region port goat bamboo city well "
        "capital mountain school coast valley leaf colony star monastery province orchard office cotton cave",
    ),
    "Instrument-Agency": (
        "hammer telescope knife camera axe laptop microscope brush spoon rope sword drill phone needle ladder chisel "
        "razor pen scanner shovel torch gun wrench saw compass radio lens scissor map machine",
        "carpenter astronomer chef detective farmer hacker biologist painter cook sailor soldier dentist reporter "
        "tailor plumber sculptor barber writer doctor gardener miner hunter mechanic nurse pilot spy student teacher "
        "thief child",
    ),
    "Member-Collection": (
        "soldier player wolf singer bee student ship tree card juror sheep fish star senator book dancer actor pilot "
        "flower guitarist bird monk stamp lawyer elephant musician judge lion nurse key",
        "army team pack choir swarm class fleet forest deck jury flock school galaxy committee library troupe cast "
        "squadron bouquet band herd order collection council orchestra panel pride staff crew bunch",
    ),
    "Message-Topic": (
        "letter report book article speech song film lecture poem essay note novel email chapter interview rumour "
        "review memo joke documentary play sermon message debate thesis story column paper leaflet podcast",
        "war budget drought marriage climate election strike history virus tax friendship crime weather music law "
        "medicine education merger love engine football religion famine revolution bridge diet poverty travel art "
        "energy",
    ),
    "Product-Producer": (
        "car wine novel bread chair film engine song clock cheese statue bridge software letter honey shirt map poem "
        "camera beer cake painting ship report toy carpet piano knife milk paper",
        "factory winery writer baker carpenter director company singer watchmaker farmer sculptor engineer student "
        "journalist bee tailor poet brewery cook painter shipyard committee team weaver workshop smith farm mill "
        "artist inventor",
    ),
}

TEMPLATES: dict[str, list[str]] = {
    "Cause-Effect": [
        "A caused B",
        "A led to B",
        "A resulted in B",
        "A triggered B",
        "A brought about B",
        "A produced B",
        "B was caused by A",
        "B resulted from A",
        "B was triggered by A",
        "B came from A",
        "B arose out of A",
        "B followed A",
    ],
    "Component-Whole": [
        "A was a part of B",
        "A of B was broken",
        "A was built into B",
        "somebody repaired A of B",
        "A belonged to B",
        "A was in B",
        "B had A",
        "B consisted mainly of A",
        "B came with A",
        "B lost A",
        "B contained A",
        "somebody saw B with A",
    ],
    "Content-Container": [
        "A was in B",
        "A lay inside B",
        "somebody found A in B",
        "A was kept in B",
        "A was hidden in B",
        "A filled B",
        "B contained A",
        "B was full of A",
        "B held A",
        "somebody opened B with A inside",
        "B had A",
        "B was stuffed with A",
    ],
    "Entity-Destination": [
        "A went to B",
        "A arrived in B",
        "somebody put A into B",
        "A was sent to B",
        "A moved into B",
        "A was brought to B",
        "A reached B",
        "B received A",
        "into B went A",
        "B was reached by A",
        "B was the goal of A",
        "B awaited A",
    ],
    "Entity-Origin": [
        "A came from B",
        "A was from B",
        "A left B",
        "A was brought from B",
        "A was derived from B",
        "A arose out of B",
        "from B came A",
        "B was the source of A",
        "B sent A",
        "B was the home of A",
        "B supplied A",
        "out of B came A",
    ],
    "Instrument-Agency": [
        "A was used by B",
        "A helped B at work",
        "A was in the hands of B",
        "A served B well",
        "somebody lent A to B",
        "A belonged to B",
        "B used A",
        "B worked with A",
        "B picked up A",
        "B relied on A",
        "somebody saw B with A",
        "B had A",
    ],
    "Member-Collection": [
        "A was a part of B",
        "A joined B",
        "A belonged to B",
        "A left B",
        "A was in B",
        "A of B was missing",
        "B included A",
        "B had A",
        "B welcomed A",
        "B consisted mainly of A",
        "B lost A",
        "B expelled A",
    ],
    "Message-Topic": [
        "A was about B",
        "A described B",
        "A explained B",
        "A dealt with B",
        "A pointed to B",
        "A raised the question of B",
        "B was described in A",
        "B was the subject of A",
        "B was discussed in A",
        "B inspired A",
        "B was explained by A",
        "B came up in A",
    ],
    "Product-Producer": [
        "A was made by B",
        "A came from B",
        "A was designed by B",
        "A was the work of B",
        "A was produced by B",
        "A was finished by B",
        "B made A",
        "B produced A",
        "B built A",
        "B created A",
        "B supplied A",
        "B worked on A",
    ],
    # Any noun may be on either side: half of these are templates that also belong to a relation.
    "Other": [
        "A was near B",
        "A was larger than B",
        "somebody compared A with B",
        "A stood beside B",
        "A was older than B",
        "somebody mentioned A before B",
        "A was sold together with B",
        "A replaced B",
        "A left B",
        "A was in B",
        "A came with B",
        "A followed B",
        "A had B",
        "A was about B",
        "somebody saw A with B",
        "A reached B",
        "A came from B",
        "A helped B at work",
    ],
}

DETERMINERS = "the the the the this that our their his her".split()
ADJECTIVES = (
    "old new small large famous strange broken heavy local green quiet expensive foreign modern wooden dark early "
    "simple rare long bright cheap dirty empty angry lonely royal western ancient plain hidden useful northern sudden "
    "second last only real public secret"
).split()
SOMEBODY = (
    "a witness,the police,my neighbour,one visitor,the owner,an expert,two workers,a guard,her uncle,the manager,"
    "a scientist,the mayor,some guests,a traveller,the museum,our guide"
).split(",")
OPENINGS = (
    "last week,in the spring,after the war,on Monday,that night,as we expected,some years ago,for this reason,"
    "to our surprise,according to the report,before the meeting,at first,in the end,near the border,during the day,"
    "without a doubt,in those days,by chance,as the papers wrote,two days later"
).split(",")
CLOSINGS = (
    "in the evening,before dawn,without any warning,for three years,at the weekend,once again,in front of everybody,"
    "after a long search,in spite of the rain,at the same time,near the old mill,for the first time,as usual,"
    "during the summer,on the other side of town,because of the cold,within an hour,against all advice,"
    "with great care,under the new law,while nobody watched,in a great hurry,at the end of the month,most of the time"
).split(",")
TAILS = (
    "and nobody complained,but few people noticed,and everyone was glad,but the plan failed,and the work went on,"
    "so we stayed at home,and that was all,but it did not matter,and the town talked about it,so the show was over"
).split(",")

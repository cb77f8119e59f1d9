"""How the referential tasks ask: {} is the expression, the place or the candidates. The first of each is asked alone
where an evaluation wants one phrasing.
"""

from __future__ import annotations

LOCATE = (
    "Where is this: {}",
    "Locate: {}",
    "Give the position of what this names: {}",
    "Which part of the picture is meant by this? {}",
    "Mark all that fits: {}",
    "Find {}.",
    "Where is {}?",
    "Locate {}.",
    "Box: {}",
    "Draw a box around {}.",
    "Mark {}.",
    "Show me {}.",
    "Look for {}.",
    "Can you find {}?",
    "Where do you see {}?",
    "Where can I find {}?",
    "Give me the box of {}.",
    "Position of {}?",
    "Can you see {}? Say where.",
    "I am looking for {}. Where is that?",
    "Pick out {} for me.",
    "Coordinates of {}, please.",
)

DESCRIBE = (
    "What is at {}?",
    "Describe what is at {}.",
    "Which words single out {}?",
    "Say what {} shows, so that it is not taken for something else.",
    "Give {} a description.",
    "What is in {}?",
    "What does {} show?",
    "Name what is at {}.",
    "What do you see at {}?",
    "What would you call {}?",
    "{}: what is that?",
    "Describe {}.",
    "Put {} into words.",
    "How would you refer to {}?",
    "Which thing is at {}?",
    "Tell me what {} shows.",
    "Say what is inside {}.",
    "Refer to {} in a few words.",
)

AT_POINT = (
    "What is at the point {}?",
    "What does {} point at?",
    "I point at {}. What is that?",
    "Name the thing at {}.",
    "What am I pointing at? {}",
    "Which thing lies under {}?",
    "What is here: {}",
    "Describe the thing at {}.",
    "{}: what is there?",
    "Tell me what is under {}.",
)

POINT_TO = (
    "Point to {}.",
    "Give a point on {}.",
    "Point at {}.",
    "Name one point of {}.",
    "Touch {}.",
    "Put your finger on {}.",
    "Where would you click for {}?",
    "One point on this, please: {}",
    "Show {} with a point.",
    "Click on {}.",
)

SPOT = (
    "Describe the picture, and say where each thing is.",
    "Give this picture a caption with the boxes of what it names.",
    "What is in this picture, and where?",
    "Tell me what you see, with the position of everything that you mention.",
    "Write a grounded caption.",
    "Describe the scene with boxes.",
    "Say what you see and where it is.",
    "What is where in this picture?",
    "A caption with positions, please.",
    "Caption this, and mark each thing.",
    "Tell me what is here, and where.",
    "Describe this, with a box behind each thing.",
    "What does the picture show, and at which places?",
    "Name the things and their places.",
)

GROUND = (
    "Ground this caption: {}",
    "Repeat this, with a box behind each thing: {}",
    "Where is what this names? {}",
    "Add the boxes: {}",
    "Mark each phrase of this: {}",
    "Write the places into this caption: {}",
    "Say this again, and where each thing is: {}",
    "Locate what is named here: {}",
    "Box everything in this sentence: {}",
    "Put positions into this: {}",
)

CHOOSE = (
    "Which of these is it: {}?",
    "Choose one of {}.",
    "The candidates are {}. Point at the right one.",
    "Is it one of these? {} Which?",
    "Pick one: {}",
    "Choose from {}.",
    "One of these is right: {} Which one?",
    "Take your pick of {}.",
    "The choices are {}.",
    "Answer with one of {}.",
    "Candidates: {}",
    "Select among {}.",
)

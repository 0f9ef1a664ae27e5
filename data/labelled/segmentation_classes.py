"""The classes of segmentation sets: names, numbers in the files, colours."""

PASCAL_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant"),
    *("sheep", "sofa", "train", "tv/monitor"),
)

# Name to `labelIds` number, in the order of `labelTrainIds`.
CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}

CAMVID = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
    *("pedestrian", "bicyclist"),
)

LABELME_FACADE = {
    "building": (128, 0, 0),
    "car": (128, 0, 128),
    "door": (128, 128, 0),
    "pavement": (128, 128, 128),
    "road": (128, 64, 0),
    "sky": (0, 128, 128),
    "vegetation": (0, 128, 0),
    "window": (0, 0, 128),
}

PASCAL_CONTEXT = (
    *("aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book"),
    *("bottle", "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth"),
    *("computer", "cow", "cup", "curtain", "dog", "door", "fence", "floor", "flower", "food"),
    *("grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse"),
    *("person", "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves"),
    *("sidewalk", "sign", "sky", "snow", "sofa", "table", "track", "train", "tree", "truck"),
    *("tvmonitor", "wall", "water", "window", "wood"),
)

# Numbers in `stuffthingmaps` (category id - 1) that no image has.
_COCO_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
COCO_FINE_OF_171 = tuple(n for n in range(182) if n not in _COCO_UNUSED)

# COCO-Stuff's supercategories, 12 of things and 15 of stuff, and the numbers of their classes.
COCO_COARSE = {
    "electronic": (*range(71, 77),),
    "appliance": (*range(77, 83),),
    "food (things)": (*range(51, 61),),
    "furniture (things)": (*range(61, 71),),
    "indoor": (*range(83, 91),),
    "kitchen": (*range(43, 51),),
    "accessory": (*range(25, 33),),
    "animal": (*range(15, 25),),
    "outdoor": (*range(9, 15),),
    "person": (0,),
    "sports": (*range(33, 43),),
    "vehicle": (*range(1, 9),),
    "ceiling": (101, 102),
    "floor": (100, *range(113, 118)),
    "food (stuff)": (120, 121, 152, 169),
    "furniture (stuff)": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": (*range(170, 177),),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}

//! New inputs out of old ones.

use spec::chooser::Dice;

/// Numbers at which code tends to change its mind.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    0x10,
    0x1f,
    0x40,
    0xff,
    0xfff,
    0x1000,
    0xffff,
    0x20_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 48,
    u64::MAX,
];

/// Changes `input` in one to four places. Takes parts of `other`, another input, now and then.
pub fn mutate(input: &mut Vec<u8>, other: &[u8], longest: usize, dice: &mut Dice) {
    for _ in 0..=dice.below(4) {
        once(input, other, dice);
        input.truncate(longest);
    }
}

fn once(input: &mut Vec<u8>, other: &[u8], dice: &mut Dice) {
    let length = input.len();
    let at = below(dice, length);
    match dice.below(12) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << dice.below(8);
            }
        }
        1 | 2 => {
            if let Some(byte) = input.get_mut(at) {
                *byte = dice.next() as u8;
            }
        }
        3 => {
            if let Some(byte) = input.get_mut(at) {
                *byte = byte.wrapping_add(dice.below(9) as u8).wrapping_sub(4);
            }
        }
        // Numbers: little-endian words anywhere, big-endian cells where a device tree has them.
        4 => overwrite(input, at, &dice.pick(&NUMBERS).to_le_bytes()),
        5 => overwrite(input, at & !3, &(dice.pick(&NUMBERS) as u32).to_be_bytes()),
        6 => {
            if let Some(cell) = input.get_mut(at & !3..).and_then(|rest| rest.first_chunk_mut::<4>()) {
                let change = [1, 2, 4, 8, 0x1000, 0x20_0000];
                let change = dice.pick(&change) as u32;
                let value = u32::from_be_bytes(*cell);
                *cell =
                    if dice.below(2) == 0 { value.wrapping_add(change) } else { value.wrapping_sub(change) }
                        .to_be_bytes();
            }
        }
        7 => {
            let count = 1 + dice.below(16);
            let new: Vec<u8> = (0..count).map(|_| dice.next() as u8).collect();
            input.splice(at..at, new);
        }
        8 => {
            let end = (at + 1 + run(dice)).min(length);
            input.drain(at.min(end)..end);
        }
        // A part once more, at its own place or elsewhere.
        9 => {
            let part = part(input, dice).to_vec();
            input.splice(at..at, part);
        }
        10 => {
            let part = part(other, dice).to_vec();
            input.splice(at..at, part);
        }
        _ => {
            let part = part(other, dice).to_vec();
            overwrite(input, at, &part);
        }
    }
}

/// A length: mostly short, now and then long; half of them whole cells.
fn run(dice: &mut Dice) -> usize {
    let limit = dice.pick(&[4, 4, 16, 64, 512]);
    let run = below(dice, limit);
    if dice.below(2) == 0 { run & !3 } else { run }
}

fn part<'a>(bytes: &'a [u8], dice: &mut Dice) -> &'a [u8] {
    let start = below(dice, bytes.len());
    let start = if dice.below(2) == 0 { start & !3 } else { start };
    let end = (start + 1 + run(dice)).min(bytes.len());
    bytes.get(start..end).unwrap_or(&[])
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in input.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// A number below `end`, or 0 where there is none.
fn below(dice: &mut Dice, end: usize) -> usize {
    if end == 0 { 0 } else { dice.below(end as u64) as usize }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_plays_the_same_inputs_and_another_plays_others() {
        let play = |seed| {
            let mut dice = Dice::new(seed);
            let mut input = vec![1, 2, 3, 4];
            (0..200).for_each(|_| mutate(&mut input, &[9; 40], 64, &mut dice));
            input
        };
        assert_eq!(play(3), play(3));
        assert_ne!(play(3), play(4));
    }

    #[test]
    fn nothing_grows_beyond_the_longest_input_and_nothing_is_too_short_to_change() {
        let mut dice = Dice::new(1);
        for longest in [0, 1, 8, 300] {
            let mut input = Vec::new();
            for _ in 0..2000 {
                mutate(&mut input, &[7; 600], longest, &mut dice);
                assert!(input.len() <= longest);
            }
        }
    }
}

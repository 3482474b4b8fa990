//! The real core and the specification, call by call: after each, the outcome and everything that can be seen of
//! pages and VMs must be the same. A difference is told as the shortest story that still shows one.

use deed_tests::pair::{Pair, Told};
use spec::Call;
use spec::chooser::{Chooser, Dice};

/// Sequences of a push; `DEED_SEQUENCES` asks for another number, `DEED_SEED` for another first seed.
const SEQUENCES: u64 = 300;
/// Calls of a sequence: this many at least, and up to three times as many.
const CALLS: u64 = 50;

/// Pages of the world: a 2 MiB region ends in their middle.
const P: usize = 32;
const V: usize = 4;
const G: usize = 12;

/// Where guests begin: at the end of a region, or where the guest's address space ends.
const GFNS: [u64; 2] = [0x1fa, (1 << 28) - G as u64];

/// A sequence: what it starts from, and its calls.
#[derive(Clone)]
struct Sequence {
    poor: bool,
    gfn: u64,
    calls: Vec<Call>,
}

/// Chooses and plays a sequence.
fn play_new(seed: u64) -> (Sequence, Told) {
    let mut dice = Dice::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let (poor, gfn) = (dice.below(2) == 0, dice.pick(&GFNS));
    let calls = CALLS + dice.below(2 * CALLS);
    let mut chooser = Chooser { dice, ends_with_space: gfn != GFNS[0] };
    let mut sequence = Sequence { poor, gfn, calls: Vec::new() };
    let mut play = Pair::<P, V, G>::new(poor, gfn);
    for number in 0..calls {
        let call = chooser.choose(play.state());
        sequence.calls.push(call);
        if number % 16 == 0 {
            play.load_all();
        }
        if !play.goes_on(call) {
            break;
        }
    }
    play.end();
    (sequence, play.told)
}

fn replay(sequence: &Sequence) -> Told {
    let mut play = Pair::<P, V, G>::new(sequence.poor, sequence.gfn);
    let _ = sequence.calls.iter().all(|call| play.goes_on(*call));
    play.end();
    play.told
}

/// Drops calls as long as there is still a difference.
fn shrink(mut sequence: Sequence) -> Told {
    let mut told = replay(&sequence);
    let mut shorter = true;
    while shorter {
        shorter = false;
        for at in (0..sequence.calls.len()).rev() {
            let mut without = sequence.clone();
            without.calls.remove(at);
            let still = replay(&without);
            if still.difference.is_some() {
                (sequence, told, shorter) = (without, still, true);
            }
        }
    }
    told
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

#[test]
fn the_core_does_what_the_specification_says() {
    let (sequences, first) = (number("DEED_SEQUENCES", SEQUENCES), number("DEED_SEED", 1));
    let mut total = Told::default();
    let mut calls = 0;
    for seed in first..first + sequences {
        let (sequence, told) = play_new(seed);
        if told.difference.is_some() {
            let told = shrink(sequence);
            panic!(
                "seed {seed}: the core and the specification differ after\n    {}\n{}",
                told.story.join("\n    "),
                told.difference.unwrap_or_default()
            );
        }
        calls += sequence.calls.len();
        total.lacks += told.lacks;
        told.pairs.into_iter().for_each(|(pair, count)| *total.pairs.entry(pair).or_default() += count);
    }
    for ((call, outcome), count) in &total.pairs {
        println!("{call}: {outcome}: {count}");
    }
    println!(
        "{sequences} sequences, {calls} calls, {} of them lacked pages; {} pairs of a call and an outcome",
        total.lacks,
        total.pairs.len()
    );
}

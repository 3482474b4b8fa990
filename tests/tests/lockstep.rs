//! The real core and the specification, call by call: after each, the outcome and everything that can be seen of
//! pages and VMs must be the same. A difference is told as the shortest story that still shows one.

use deed_tests::pair::{Pair, Told};
use deed_tests::{calls_of_the_core, tell_reached};
use spec::Call;
use spec::chooser::{Chooser, Dice};
use spec::worlds::LISTED;
use std::collections::{BTreeMap, BTreeSet};

/// Sequences of a push; `DEED_SEQUENCES` asks for another number, `DEED_SEED` for another first seed.
const SEQUENCES: u64 = 20_000;
/// Calls of a sequence: this many at least, and up to three times as many.
const CALLS: u64 = 50;

/// Pages of the world: a 2 MiB region ends in their middle.
const P: usize = 32;
const V: usize = 4;
const G: usize = 12;

/// Where guests begin: at the end of a region, or where the guest's address space ends.
const GFNS: [u64; 2] = [0x1fa, (1 << 28) - G as u64];

/// Calls that lack table pages where they split a whole block, which is larger than this world:
/// `failing_allocations.rs` lets them lack those.
const SPLITS: [&str; 11] = [
    "UNSHARE_HYP",
    "UNSHARE_GUEST",
    "RECLAIM_GUEST",
    "FORCE_RECLAIM",
    "UNSHARE_ACK",
    "VM_TEARDOWN_FINISH",
    "pin",
    "MEM_SHARE",
    "MEM_UNSHARE",
    "MEM_RELINQUISH",
    "MMIO_GUARD_UNMAP",
];
/// Outcomes that take more VMs, vCPUs or pins than this world has, or a page number that the chooser does not know:
/// unit tests of `hyp` and the target `calls` come to them.
const ELSEWHERE: [(&str, &str); 4] =
    [("VM_CREATE", "Busy"), ("VM_CREATE", "NoMemory: metadata"), ("pin", "Busy"), ("QUERY_PAGE", "Invalid")];

/// The outcomes that the specification lists of calls of the core, and that sequences of this world come to.
fn expected() -> BTreeSet<(&'static str, &'static str)> {
    let listed = spec::call::CALLS.into_iter().zip(LISTED);
    let pairs = listed.flat_map(|(call, outcomes)| outcomes.iter().map(move |outcome| (call, *outcome)));
    let is_here = |pair: &(&str, &str)| {
        let splits = SPLITS.contains(&pair.0) && pair.1.starts_with("NoMemory");
        !splits && !ELSEWHERE.contains(pair) && calls_of_the_core().any(|call| call == pair.0)
    };
    pairs.filter(is_here).collect()
}

/// What happens next.
#[derive(Clone, Copy)]
enum Step {
    /// Every TLB holds whatever it may.
    Fill,
    Call(Call),
}

/// A sequence: what it starts from, and its steps.
#[derive(Clone)]
struct Sequence {
    poor: bool,
    gfn: u64,
    steps: Vec<Step>,
}

/// Chooses and plays a sequence.
fn play_new(seed: u64) -> (Sequence, Told) {
    let mut dice = Dice::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let (poor, gfn) = (dice.below(2) == 0, dice.pick(&GFNS));
    let calls = CALLS + dice.below(2 * CALLS);
    let mut chooser = Chooser { dice, ends_with_space: gfn != GFNS[0] };
    let mut sequence = Sequence { poor, gfn, steps: Vec::new() };
    let mut pair = Pair::<P, V, G>::new(poor, gfn);
    for number in 0..calls {
        let call = chooser.choose(pair.state());
        if number % 16 == 0 {
            sequence.steps.push(Step::Fill);
            pair.load_all();
        }
        sequence.steps.push(Step::Call(call));
        if !pair.goes_on(call) {
            break;
        }
    }
    pair.end();
    (sequence, pair.told)
}

fn replay(sequence: &Sequence) -> Told {
    let mut pair = Pair::<P, V, G>::new(sequence.poor, sequence.gfn);
    let _ = sequence.steps.iter().all(|step| match step {
        Step::Fill => {
            pair.load_all();
            true
        }
        Step::Call(call) => pair.goes_on(*call),
    });
    pair.end();
    pair.told
}

/// Drops steps as long as there is still a difference.
fn shrink(mut sequence: Sequence, mut told: Told) -> Told {
    let mut shorter = true;
    while shorter {
        shorter = false;
        for at in (0..sequence.steps.len()).rev() {
            let mut without = sequence.clone();
            without.steps.remove(at);
            let still = replay(&without);
            if still.difference.is_some() {
                (sequence, told, shorter) = (without, still, true);
            }
        }
    }
    told
}

/// What was seen of many sequences.
#[derive(Default)]
struct Total {
    calls: u64,
    lacks: u64,
    pairs: BTreeMap<(&'static str, &'static str), u64>,
    /// The story of the difference, by the seed of its sequence.
    difference: Option<(u64, String)>,
}

impl Total {
    /// Plays sequences until there is a difference.
    fn play(seeds: impl Iterator<Item = u64>) -> Self {
        let mut total = Self::default();
        for seed in seeds {
            let (sequence, told) = play_new(seed);
            if told.difference.is_some() {
                let told = shrink(sequence, told);
                let what = told.difference.unwrap_or_default();
                total.difference = Some((seed, format!("    {}\n{what}", told.story.join("\n    "))));
                break;
            }
            total.calls += told.story.len() as u64;
            total.lacks += told.lacks;
            total.add_pairs(told.pairs);
        }
        total
    }

    fn add_pairs(&mut self, pairs: BTreeMap<(&'static str, &'static str), u64>) {
        pairs.into_iter().for_each(|(pair, count)| *self.pairs.entry(pair).or_default() += count);
    }

    fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.lacks += other.lacks;
        self.add_pairs(other.pairs);
        self.difference = match (self.difference.take(), other.difference) {
            (Some(a), Some(b)) => Some(if a.0 < b.0 { a } else { b }),
            (a, b) => a.or(b),
        };
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(otherwise)
}

#[test]
fn the_core_does_what_the_specification_says() {
    let (sequences, first) = (number("DEED_SEQUENCES", SEQUENCES), number("DEED_SEED", 1));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut total = Total::default();
    std::thread::scope(|scope| {
        let play = |thread: usize| (first..first + sequences).skip(thread).step_by(threads);
        let running: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || Total::play(play(thread)))).collect();
        running
            .into_iter()
            .for_each(|thread| total.add(thread.join().expect("the thread tells differences")));
    });
    if let Some((seed, story)) = total.difference {
        panic!("seed {seed}: the core and the specification differ after\n{story}");
    }
    for ((call, outcome), count) in &total.pairs {
        println!("{call}: {outcome}: {count}");
    }
    // What the specification lists and no sequence came to is not tested.
    let never: Vec<_> = expected().into_iter().filter(|pair| !total.pairs.contains_key(pair)).collect();
    assert!(sequences < SEQUENCES || never.is_empty(), "never seen: {never:?}");
    tell_reached(format_args!(
        "{sequences} sequences, {} calls, {} of them lacked pages; {} pairs of a call and an outcome",
        total.calls,
        total.lacks,
        total.pairs.len()
    ));
}

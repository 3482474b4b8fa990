//! The real core in every state of a small world: 2 pages, 2 VMs, 2 guest pages of each. In each state every call
//! is tried, and outcome and state compared with the specification.
//!
//! The core is not rebuilt for each call: it is led through the states, always to the nearest one where something
//! is untried.

use abi::page::{Permissions, Pool};
use deed_tests::pair::{Pair, Told};
use spec::explore::{MAX_HOLDS, encode};
use spec::{Call, Run, State, step};
use std::collections::{HashMap, VecDeque};

/// Four pages for the roots of the VMs, and two that the calls are about.
const P: usize = 6;
const V: usize = 2;
const G: usize = 2;
/// A region ends between the two guest pages.
const GFN: u64 = 0x1ff;

/// States that there are at least: fewer mean that the way to some is not found any more.
const STATES: usize = 4_000;

type Small = State<P, V, G>;

/// The calls that make the VMs.
fn births(kinds: [(bool, bool); V]) -> Vec<Call> {
    let roots = [0, 2].into_iter();
    roots
        .zip(kinds)
        .map(|(root, (protected, immediate))| Call::VmCreate { protected, immediate, root })
        .collect()
}

/// Whether all is tried that can be, whatever time that takes: what is in a page, and who got it for good, then make
/// states of their own.
fn is_long() -> bool {
    std::env::var_os("DEED_SEQUENCES").is_some()
}

/// What is tried in each state. VMs are made before: their number is part of the world.
fn calls() -> Vec<Call> {
    let mut calls = Vec::new();
    let permissions = Permissions { write: false, execute: true };
    for pfn in [4, 5] {
        for count in 1..=2 {
            let pfns = Run { first: pfn, count };
            calls.extend([Call::ShareHyp { pfns }, Call::UnshareHyp { pfns }, Call::ForceReclaim { pfns }]);
        }
        calls.extend([Call::Pin { pfn }, Call::Unpin { pfn }, Call::QueryPage { pfn }]);
        if is_long() {
            let pfns = Run::one(pfn);
            calls.extend([Pool::Tables, Pool::Metadata].map(|pool| Call::PoolTopUp { pool, pfns }));
            calls.push(Call::HostStore { pfn });
        }
        for vm in 0..V as u8 {
            calls.push(Call::VmTopUp { vm, pfns: Run::one(pfn) });
            for gfn in 0..G as u64 {
                calls.push(Call::DonateGuest { vm, pfn, gfn, count: 1 });
                calls.push(Call::ShareGuest { vm, pfn, gfn, count: 1, permissions });
            }
        }
    }
    for vm in 0..V as u8 {
        calls.push(Call::DonateGuest { vm, pfn: 4, gfn: 0, count: 2 });
        calls.push(Call::ShareGuest { vm, pfn: 4, gfn: 0, count: 2, permissions });
        calls.push(Call::VmTopUp { vm, pfns: Run { first: 4, count: 2 } });
        if is_long() {
            calls.extend([0, 1].map(|gfn| Call::GuestStore { vm, gfn }));
        }
        for gfns in [Run::one(0), Run::one(1), Run { first: 0, count: 2 }] {
            calls.extend([
                Call::UnshareGuest { vm, gfns },
                Call::ReclaimGuest { vm, gfns },
                Call::Share { vm, gfns },
                Call::Unshare { vm, vcpu: 0, gfns },
                Call::Relinquish { vm, gfns },
                Call::GuardMap { vm, gfns },
                Call::GuardUnmap { vm, gfns },
            ]);
        }
        calls.extend([Call::UnshareAck { vm, vcpu: 0 }, Call::UnshareAck { vm, vcpu: 1 }]);
        calls.extend([Call::VmTeardownStart { vm }, Call::VmTeardownFinish { vm }]);
    }
    calls
}

/// Whether there is no way back from a call that succeeds.
fn is_final(call: Call) -> bool {
    matches!(
        call,
        Call::VmTeardownStart { .. }
            | Call::VmTeardownFinish { .. }
            | Call::VmTopUp { .. }
            | Call::PoolTopUp { .. }
            | Call::ForceReclaim { .. }
    )
}

/// Which calls are untried in each state that was met.
struct Untried {
    calls: Vec<Call>,
    states: HashMap<u128, Vec<usize>>,
    tried: u64,
}

impl Untried {
    /// The calls that are untried in a state, those that change it last.
    fn of(&mut self, place: &spec::World, state: &Small) -> &mut Vec<usize> {
        self.states.entry(encode(state)).or_insert_with(|| {
            let bounded = |call: &Call| match *call {
                Call::Pin { pfn } => state.pages[pfn as usize].pins < MAX_HOLDS,
                _ => true,
            };
            let mut untried: Vec<usize> =
                (0..self.calls.len()).filter(|at| bounded(&self.calls[*at])).collect();
            // Taken from the end: first what is refused, last what there is no way back from.
            untried.sort_by_key(|at| match step(place, state, self.calls[*at], None).0 {
                outcome if outcome.is_refusal() => 2,
                _ => i32::from(!is_final(self.calls[*at])),
            });
            untried
        })
    }

    fn has_untried(&mut self, place: &spec::World, state: &Small, finals: bool) -> bool {
        let untried = self.of(place, state).clone();
        untried.iter().any(|at| finals || !is_final(self.calls[*at]))
    }

    /// The calls to the nearest state where something is untried, if possible without a step that there is no way
    /// back from.
    fn way(&mut self, place: &spec::World, from: &Small) -> Option<Vec<Call>> {
        self.way_by(place, from, false).or_else(|| self.way_by(place, from, true))
    }

    fn way_by(&mut self, place: &spec::World, from: &Small, finals: bool) -> Option<Vec<Call>> {
        let calls: Vec<Call> = self.calls.iter().copied().filter(|call| finals || !is_final(*call)).collect();
        nearest(place, from, &calls, |state| self.has_untried(place, state, finals))
    }
}

/// The fewest of these calls that lead to a state that is looked for.
fn nearest(
    place: &spec::World,
    from: &Small,
    calls: &[Call],
    mut is_there: impl FnMut(&Small) -> bool,
) -> Option<Vec<Call>> {
    let mut origins: HashMap<u128, Option<(u128, Call)>> = HashMap::from([(encode(from), None)]);
    let mut queue = VecDeque::from([*from]);
    while let Some(state) = queue.pop_front() {
        let key = encode(&state);
        if is_there(&state) {
            let mut way = Vec::new();
            let mut at = key;
            while let Some(Some((before, call))) = origins.get(&at) {
                way.push(*call);
                at = *before;
            }
            way.reverse();
            return Some(way);
        }
        for call in calls {
            if matches!(*call, Call::Pin { pfn } if state.pages[pfn as usize].pins >= MAX_HOLDS) {
                continue;
            }
            let next = step(place, &state, *call, None).1;
            origins.entry(encode(&next)).or_insert_with(|| {
                queue.push_back(next);
                Some((key, *call))
            });
        }
    }
    None
}

/// Both sides with VMs of these kinds.
fn born(kinds: [(bool, bool); V]) -> Pair<P, V, G> {
    // With few table pages, and so with TLBs that hold only what was touched: that is faster to check.
    let mut pair = Pair::new(true, GFN);
    let all = births(kinds).into_iter().all(|birth| pair.goes_on(birth));
    assert!(all, "{:?}", pair.told);
    pair
}

fn tell(told: &Told) -> String {
    let last = told.story.len().saturating_sub(40);
    format!("    {}\n{}", told.story[last..].join("\n    "), told.difference.as_deref().unwrap_or_default())
}

/// Plays a call; a difference is told from the beginning on, by the shortest way to it if that shows it too.
fn play(pair: &mut Pair<P, V, G>, kinds: [(bool, bool); V], call: Call) {
    let before = *pair.state();
    if pair.goes_on(call) {
        return;
    }
    let mut again = born(kinds);
    let way = nearest(pair.place(), again.state(), &calls(), |state| encode(state) == encode(&before));
    let differs = way.is_some_and(|way| !way.into_iter().chain([call]).all(|call| again.goes_on(call)));
    panic!("\n{}", tell(if differs { &again.told } else { &pair.told }));
}

/// Tries everything with VMs of these kinds, protected and immediate; returns states, pairs tried and cores built.
fn tour(kinds: [(bool, bool); V]) -> (usize, u64, u64) {
    let mut untried = Untried { calls: calls(), states: HashMap::new(), tried: 0 };
    let mut cores = 0;
    loop {
        let mut pair = born(kinds);
        cores += 1;
        let mut found = false;
        while let Some(way) = untried.way(&pair.place().clone(), pair.state()) {
            found = true;
            way.into_iter().for_each(|call| play(&mut pair, kinds, call));
            let place = *pair.place();
            if let Some(at) = untried.of(&place, pair.state()).pop() {
                let call = untried.calls[at];
                play(&mut pair, kinds, call);
                untried.tried += 1;
            }
        }
        pair.end();
        assert_eq!(pair.told.difference, None);
        if !found {
            return (untried.states.len(), untried.tried, cores);
        }
    }
}

#[test]
fn every_call_in_every_state_of_a_small_world_is_as_specified() {
    let mut worlds = vec![("an immediate one and one that is not protected", [(true, true), (false, false)])];
    // The long run: an unshare that is asked for is part of a state, so there are many more.
    if is_long() {
        worlds.push(("one that asks and an immediate one", [(true, false), (true, true)]));
    }
    for (name, kinds) in worlds {
        let (states, tried, cores) = tour(kinds);
        println!("{name}: {states} states, {tried} pairs of a state and a call, {cores} cores");
        assert!(states >= STATES, "{name}: fewer states than there were");
    }
}

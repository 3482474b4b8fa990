//! The real core in every state of a small world: 2 pages, 2 VMs, 2 guest pages of each. In each state every call
//! is tried, and outcome and state compared with the specification; and each allocation of it fails once before, which must
//! change nothing.
//!
//! The core is not rebuilt for each call: it is led through the states, always to the nearest one where something
//! is untried.

use abi::page::{Permissions, Pool};
use deed_tests::graph::{Graph, Search, Tries};
use deed_tests::pair::{Pair, Told};
use deed_tests::{calls_of_the_core, tell_reached};
use spec::{Call, Run};

/// Four pages for the roots of the VMs, and two that the calls are about.
const P: usize = 6;
const V: usize = 2;
const G: usize = 2;
/// A region ends between the two guest pages.
const GFN: u64 = 0x1ff;

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

/// What is tried in each state, about the first `vms` VMs. VMs are made before: their number is part of the world.
fn calls(vms: u8) -> Vec<Call> {
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
        for vm in 0..vms {
            calls.push(Call::VmTopUp { vm, pfns: Run::one(pfn) });
            for gfn in 0..G as u64 {
                calls.push(Call::DonateGuest { vm, pfn, gfn, count: 1 });
                calls.push(Call::ShareGuest { vm, pfn, gfn, count: 1, permissions });
            }
        }
    }
    for vm in 0..vms {
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
            // Two that ask at the same time make three times as many states.
            if vms == 1 {
                calls.push(Call::Unshare { vm, vcpu: 1, gfns });
            }
        }
        calls.extend([Call::UnshareAck { vm, vcpu: 0 }, Call::UnshareAck { vm, vcpu: 1 }]);
        calls.extend([Call::VmTeardownStart { vm }, Call::VmTeardownFinish { vm }]);
    }
    calls
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

/// A walk through the world that tries every call in every state.
struct Tour {
    kinds: [(bool, bool); V],
    graph: Graph<P, V, G>,
    /// What is untried in each state.
    untried: Vec<Tries>,
    /// For a way without a step that there is no way back from, and for any.
    searches: [Search; 2],
    tried: u64,
    /// Allocations that were made to fail.
    failures: u64,
}

impl Tour {
    /// Of a world with VMs of these kinds, protected and immediate, of which calls are about the first `vms`.
    fn of(kinds: [(bool, bool); V], vms: u8) -> Self {
        let pair = born(kinds);
        let graph = Graph::new(pair.place(), pair.state(), &calls(vms));
        let searches = [false, true].map(|finals| Search::new(&graph, finals));
        Self { kinds, untried: graph.tries.clone(), graph, searches, tried: 0, failures: 0 }
    }

    /// The calls to the nearest state where something is untried, if possible without a step that there is no way
    /// back from.
    fn way(&mut self, from: usize) -> Option<Vec<Call>> {
        let Self { graph, untried, searches: [returning, any], .. } = self;
        let way = returning.way(graph, from, |state| !untried[state].returning.is_empty());
        way.or_else(|| any.way(graph, from, |state| !untried[state].is_empty()))
    }

    /// Leads a core from state to state, until nothing is untried where it can still get to. Returns whether it tried
    /// anything.
    fn walk(&mut self) -> bool {
        let mut pair = born(self.kinds);
        let before = self.tried;
        while let Some(way) = self.way(self.graph.number(pair.state())) {
            way.into_iter().for_each(|call| self.play(&mut pair, call));
            if let Some(call) = self.untried[self.graph.number(pair.state())].pop() {
                pair.fail_allocations(true);
                self.play(&mut pair, call);
                pair.fail_allocations(false);
                self.tried += 1;
            }
        }
        pair.end();
        self.failures += pair.told.failures;
        assert_eq!(pair.told.difference, None);
        self.tried > before
    }

    /// Plays a call; a difference is told from the beginning on, by the shortest way to it if that shows it too.
    fn play(&self, pair: &mut Pair<P, V, G>, call: Call) {
        let before = self.graph.number(pair.state());
        if pair.goes_on(call) {
            return;
        }
        let mut again = born(self.kinds);
        let way = Search::new(&self.graph, true).way(&self.graph, 0, |state| state == before);
        let differs = way.is_some_and(|way| !way.into_iter().chain([call]).all(|call| again.goes_on(call)));
        panic!("\n{}", tell(if differs { &again.told } else { &pair.told }));
    }
}

#[test]
fn every_call_in_every_state_of_a_small_world_is_as_specified() {
    // An unshare that is asked for is part of a state, so there are many more: two such VMs are for the long run.
    let asking = if is_long() { 2 } else { 1 };
    // Fewer than the least number of states mean that the way to some is not found any more.
    for (name, kinds, vms, least) in [
        ("an immediate VM and one that is not protected", [(true, true), (false, false)], 2, 4_000),
        ("a VM that asks and an immediate one", [(true, false), (true, true)], asking, 500),
    ] {
        let mut tour = Tour::of(kinds, vms);
        let cores = 1 + std::iter::repeat_with(|| tour.walk()).take_while(|more| *more).count();
        let (states, tried, failures) = (tour.untried.len(), tour.tried, tour.failures);
        tell_reached(format_args!(
            "{name}: {states} states, {tried} pairs of a state and a call, {failures} of them once more with an allocation \
             that fails, {cores} cores"
        ));
        assert!(states >= least, "{name}: fewer states than there were");
        assert!(failures > 0, "{name}: no allocation failed");
        assert!(tour.untried.iter().all(Tries::is_empty), "{name}: something was not tried");
    }
}

#[test]
fn every_call_of_the_core_is_tried_but_the_one_that_makes_the_world() {
    let tried = calls(1);
    let is_tried = |name: &str| tried.iter().any(|call| spec::call::CALLS[call.kind()] == name);
    let missing: Vec<&str> = calls_of_the_core().filter(|name| !is_tried(name)).collect();
    let expected: &[&str] = match is_long() {
        true => &["VM_CREATE"],
        false => &["POOL_TOPUP", "VM_CREATE", "guest's store", "host's store"],
    };
    assert_eq!(missing, expected);
}

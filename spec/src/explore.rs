//! Every state of a small world: breadth first, states that differ in the names of pages or VMs only counted once,
//! so that the first broken one found is also one of the shortest ways there.

use crate::access::is_honest;
use crate::call::{CALLS, Call, OUTCOMES, Outcome};
use crate::invariants::{broken_by_state, broken_by_step, broken_for_honest_host};
use crate::names::{Names, canonical, representatives};
use crate::state::{GuestEntry, HostEntry, Sharing, State, Use};
use crate::step::World;
use abi::page::Pool;
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The rules that are explored: [`step`](crate::step()), or a copy of it with a mistake, for tests.
pub type Rules<const P: usize, const V: usize, const G: usize> =
    fn(&World, &State<P, V, G>, Call, Option<Pool>) -> (Outcome, State<P, V, G>);

/// Holds on a page that the explored worlds stop at.
pub const MAX_HOLDS: u32 = 2;

/// A small world and what is tried in it.
#[derive(Clone, Debug)]
pub struct Game<const P: usize, const V: usize, const G: usize> {
    /// Where it lies. Its first page is even, and pages are named in pairs, for the roots of VMs.
    pub world: World,
    /// What is tried in every state.
    pub calls: Vec<Call>,
    /// The host means well.
    pub honest: bool,
    /// No call tells pages apart but by their names: states that differ in names only count once.
    pub merged: bool,
    /// The rules.
    pub rules: Rules<P, V, G>,
}

/// How often each outcome of each call was seen: by [`Call::kind`], then [`Outcome::kind`].
pub type Pairs = [[u64; OUTCOMES.len()]; CALLS.len()];

/// What was found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Distinct states.
    pub states: usize,
    /// Calls from boot to the state that is the farthest.
    pub depth: usize,
    /// Calls tried.
    pub steps: u64,
    /// What came of them.
    pub pairs: Pairs,
    /// An invariant that does not hold, and the calls that lead there.
    pub broken: Option<(&'static str, Vec<String>)>,
}

/// States that a thread visits at a time.
const CHUNK: usize = 1024;

/// States that were met, by their codes.
type Seen = HashSet<u128, BuildHasherDefault<Mix>>;

/// What came of the calls in some states.
struct Part<const P: usize, const V: usize, const G: usize> {
    steps: u64,
    pairs: Pairs,
    /// States that were not met before this layer, each once.
    found: Vec<(u128, State<P, V, G>, Origin)>,
    /// What is broken, by which call, and the pool that lacked pages for it.
    broken: Option<(&'static str, Origin, Option<Pool>)>,
}

/// Where a state came from: the number of the one before, and the number of the call.
#[derive(Clone, Copy)]
struct Origin {
    before: u32,
    call: u16,
}

impl<const P: usize, const V: usize, const G: usize> Game<P, V, G> {
    /// Visits every state, or stops at the first that breaks an invariant. On all CPUs, but what is found, and by
    /// which calls, does not depend on how many these are.
    pub fn explore(&self) -> Report {
        let mut report = Report { states: 1, depth: 0, steps: 0, pairs: [[0; _]; _], broken: None };
        let start = self.merge(&State::new()).0;
        let mut seen = Seen::default();
        seen.insert(encode(&start));
        let mut origins = vec![Origin { before: 0, call: 0 }];
        let mut layer = vec![start];
        let mut first = 0;
        while !layer.is_empty() {
            let mut next_layer = Vec::new();
            for part in self.visit_layer(&layer, first, &seen) {
                report.steps += part.steps;
                let rows = report.pairs.iter_mut().flatten().zip(part.pairs.iter().flatten());
                rows.for_each(|(sum, count)| *sum += count);
                if let Some((what, origin, lack)) = part.broken {
                    report.broken = Some((what, self.story(&origins, origin, lack)));
                    return report;
                }
                for (code, state, origin) in part.found {
                    if seen.insert(code) {
                        origins.push(origin);
                        next_layer.push(state);
                    }
                }
            }
            first += layer.len();
            report.states = origins.len();
            report.depth += usize::from(!next_layer.is_empty());
            layer = next_layer;
        }
        report
    }

    /// Makes every call in every state of a layer, which are numbered from `first` on. What comes of them, part by
    /// part in the order of the states.
    fn visit_layer(&self, layer: &[State<P, V, G>], first: usize, seen: &Seen) -> Vec<Part<P, V, G>> {
        let chunks: Vec<_> = layer.chunks(CHUNK).enumerate().collect();
        let next = AtomicUsize::new(0);
        let work = || {
            let mut parts = Vec::new();
            while let Some((number, states)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                parts.push((*number, self.visit(states, first + number * CHUNK, seen)));
            }
            parts
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(chunks.len());
        let mut parts = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut parts = work();
            for other in others {
                parts.extend(other.join().expect("the rules stop nobody"));
            }
            parts
        });
        parts.sort_by_key(|(number, _)| *number);
        parts.into_iter().map(|(_, part)| part).collect()
    }

    /// Makes every call in these states.
    fn visit(&self, states: &[State<P, V, G>], first: usize, seen: &Seen) -> Part<P, V, G> {
        let mut part = Part { steps: 0, pairs: [[0; _]; _], found: Vec::new(), broken: None };
        let mut here = Seen::default();
        for (offset, state) in states.iter().enumerate() {
            let names = if self.merged { representatives(state) } else { [true; P] };
            for (number, call) in self.calls.iter().enumerate() {
                if !self.is_tried(state, &names, *call) {
                    continue;
                }
                let (outcome, next) = (self.rules)(&self.world, state, *call, None);
                let origin = Origin { before: (first + offset) as u32, call: number as u16 };
                if let Some(pool) = self.count(&mut part, state, *call, (outcome, &next)) {
                    part.broken = Some(("I5: a call that lacks pages changed something", origin, Some(pool)));
                    return part;
                }
                if next == *state {
                    continue;
                }
                if let Some(what) =
                    broken_by_step(state, *call, outcome, &next).or_else(|| self.broken(&next))
                {
                    part.broken = Some((what, origin, None));
                    return part;
                }
                let next = self.merge(&next).0;
                let code = encode(&next);
                if !seen.contains(&code) && here.insert(code) {
                    part.found.push((code, next, origin));
                }
            }
        }
        part
    }

    fn merge(&self, state: &State<P, V, G>) -> (State<P, V, G>, Names<P, V>) {
        if self.merged { canonical(state) } else { (*state, Names::SAME) }
    }

    fn broken(&self, state: &State<P, V, G>) -> Option<&'static str> {
        let host = || if self.honest { broken_for_honest_host(state) } else { None };
        broken_by_state(state).or_else(host)
    }

    /// Whether a call is tried in a state: not by a name that another page goes by as well, and not beyond the
    /// bounds of the world.
    fn is_tried(&self, state: &State<P, V, G>, names: &[bool; P], call: Call) -> bool {
        let page = page_of(call).and_then(|pfn| names.get(pfn as usize));
        if page == Some(&false) || self.honest && !is_honest(state, call) {
            return false;
        }
        match call {
            Call::Pin { pfn } => state.pages.get(pfn as usize).is_none_or(|page| page.pins < MAX_HOLDS),
            _ => true,
        }
    }

    /// Counts an outcome; if the call was served, also what becomes of it when a pool has too little: either that
    /// pool is lacking, and nothing changes, or it makes no difference. Returns the pool of which neither is true.
    fn count(
        &self,
        part: &mut Part<P, V, G>,
        state: &State<P, V, G>,
        call: Call,
        (outcome, next): (Outcome, &State<P, V, G>),
    ) -> Option<Pool> {
        let row = &mut part.pairs[call.kind()];
        row[outcome.kind()] += 1;
        part.steps += 1;
        if outcome.is_refusal() {
            return None;
        }
        for pool in [Pool::Tables, Pool::Metadata, Pool::Vm] {
            let (lacking, after) = (self.rules)(&self.world, state, call, Some(pool));
            if lacking == Outcome::Lacking(pool) && after == *state {
                row[lacking.kind()] += 1;
                part.steps += 1;
            } else if (lacking, &after) != (outcome, next) {
                return Some(pool);
            }
        }
        None
    }

    /// Tells the calls from boot to a step, all in the names that pages and VMs have at boot.
    /// For the last call a pool may lack pages.
    fn story(&self, origins: &[Origin], last: Origin, lack: Option<Pool>) -> Vec<String> {
        let mut calls = vec![(self.calls[usize::from(last.call)], lack)];
        let mut at = last.before as usize;
        while at != 0 {
            calls.push((self.calls[usize::from(origins[at].call)], None));
            at = origins[at].before as usize;
        }
        let mut told = State::new();
        let (mut state, mut names) = self.merge(&told);
        let mut story = Vec::new();
        for (call, lack) in calls.into_iter().rev() {
            let by_name = names.inverse().rename(call);
            let (outcome, next) = (self.rules)(&self.world, &told, by_name, lack);
            story.push(format!("{by_name} -> {outcome}"));
            told = next;
            let (_, next) = (self.rules)(&self.world, &state, call, None);
            let (next, renamed) = self.merge(&next);
            state = next;
            names = names.then(&renamed);
        }
        story
    }
}

/// A page that a call names first.
fn page_of(call: Call) -> Option<u64> {
    match call {
        Call::PoolTopUp { pfns, .. }
        | Call::VmTopUp { pfns, .. }
        | Call::ShareHyp { pfns }
        | Call::UnshareHyp { pfns }
        | Call::ForceReclaim { pfns } => Some(pfns.first),
        Call::DonateGuest { pfn, .. }
        | Call::ShareGuest { pfn, .. }
        | Call::QueryPage { pfn }
        | Call::VmCreate { root: pfn, .. }
        | Call::Pin { pfn }
        | Call::Unpin { pfn }
        | Call::HostStore { pfn }
        | Call::Map { pfn }
        | Call::Unmap { pfn }
        | Call::Hold { pfn }
        | Call::Release { pfn } => Some(pfn),
        _ => None,
    }
}

/// A state as one number, different for different states.
///
/// # Panics
/// If the world is too large for that, or a page is pinned more than [`MAX_HOLDS`] times.
pub fn encode<const P: usize, const V: usize, const G: usize>(state: &State<P, V, G>) -> u128 {
    let mut number = 0u128;
    let mut put = |digit: usize, base: usize| {
        assert!(digit < base, "the state is beyond the bounds of its world");
        let shifted = number.checked_mul(base as u128).expect("128 bits are enough for a small world");
        number = shifted + digit as u128;
    };
    for page in &state.pages {
        let host = match page.host {
            HostEntry::Owned => 0,
            HostEntry::LentToHyp => 1,
            HostEntry::Borrowed => 2,
            HostEntry::Hyp(Use::Pool) => 3,
            HostEntry::Hyp(Use::Vm(vm)) => 4 + usize::from(vm),
            HostEntry::Guest { vm, gfn } => 4 + V + usize::from(vm) * G + usize::from(gfn),
            HostEntry::LentToGuests(borrowers) => 4 + V + V * G + usize::from(borrowers) - 1,
        };
        put(host, 4 + V + 2 * V * G);
        put(page.pins as usize, MAX_HOLDS as usize + 1);
        put(page.content as usize, 3);
        put(usize::from(page.mapped) << 1 | usize::from(page.held), 4);
    }
    for vm in &state.vms {
        put(vm.phase as usize, 4);
        put(usize::from(vm.protected) << 1 | usize::from(vm.immediate), 4);
        put(vm.pages.into(), G + 1);
        for pending in vm.pending {
            let run = pending.map_or(0, |run| 1 + run.first as usize * G + run.count as usize - 1);
            put(run, 1 + G * G);
        }
        for entry in vm.entries {
            let entry = match entry {
                GuestEntry::Empty => 0,
                GuestEntry::Device => 1,
                GuestEntry::Poisoned => 2,
                GuestEntry::Page { pfn, sharing } => {
                    let sharing = match sharing {
                        Sharing::Owned => 0,
                        Sharing::Shared => 1,
                        Sharing::Borrowed(permissions) => 2 + permissions.to_word() as usize,
                    };
                    3 + usize::from(pfn) * 6 + sharing
                }
            };
            put(entry, 3 + P * 6);
        }
    }
    number
}

/// Hashes a number by two multiplications.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("states are numbers");
    }

    fn write_u128(&mut self, number: u128) {
        let low = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let high = ((number >> 64) as u64 ^ low.rotate_right(32)).wrapping_mul(0xd1b5_4a32_d192_ed03);
        self.0 = high ^ high >> 29;
    }
}

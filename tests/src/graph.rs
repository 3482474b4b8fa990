//! All states of a small world and the calls that lead from one to another, by the specification alone.
//!
//! States are numbers here, so that a way through the world is found without asking the rules again.

use spec::explore::{MAX_HOLDS, encode};
use spec::{Call, State, World, step};
use std::collections::HashMap;

/// A call that leads to another state.
#[derive(Clone, Copy, Debug)]
struct Step {
    call: Call,
    next: usize,
    is_final: bool,
}

/// What is to be tried in a state; of each list the last first.
#[derive(Clone, Debug, Default)]
pub struct Tries {
    /// What is refused, and what there is a way back from.
    pub returning: Vec<Call>,
    /// The rest.
    pub leaving: Vec<Call>,
}

impl Tries {
    /// The next one, those that there is no way back from last.
    pub fn pop(&mut self) -> Option<Call> {
        self.returning.pop().or_else(|| self.leaving.pop())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.returning.is_empty() && self.leaving.is_empty()
    }
}

/// Every state that calls lead to from a first one, which is state 0.
#[derive(Debug)]
pub struct Graph<const P: usize, const V: usize, const G: usize> {
    states: Vec<State<P, V, G>>,
    numbers: HashMap<u128, usize>,
    /// From each state, one step to each other that a single call leads to.
    steps: Vec<Vec<Step>>,
    /// What is to be tried in each state.
    pub tries: Vec<Tries>,
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

impl<const P: usize, const V: usize, const G: usize> Graph<P, V, G> {
    /// Makes these calls in every state that they lead to. Pages are pinned [`MAX_HOLDS`] times at most.
    pub fn new(world: &World, first: &State<P, V, G>, calls: &[Call]) -> Self {
        let numbers = HashMap::from([(encode(first), 0)]);
        let mut graph = Self { states: vec![*first], numbers, steps: Vec::new(), tries: Vec::new() };
        while let Some(state) = graph.states.get(graph.steps.len()).copied() {
            graph.visit(world, &state, calls);
        }
        graph
    }

    /// Makes the calls in the first state that was not visited yet.
    fn visit(&mut self, world: &World, state: &State<P, V, G>, calls: &[Call]) {
        let mut steps: Vec<Step> = Vec::new();
        let mut tries = Tries::default();
        let mut refused = Vec::new();
        for call in calls.iter().copied() {
            if matches!(call, Call::Pin { pfn } if state.pages[pfn as usize].pins >= MAX_HOLDS) {
                continue;
            }
            let (outcome, next) = step(world, state, call, None);
            let is_final = is_final(call);
            match (outcome.is_refusal(), is_final) {
                (true, _) => refused.push(call),
                (false, true) => tries.leaving.push(call),
                (false, false) => tries.returning.push(call),
            }
            let next = self.enter(next);
            let step = Step { call, next, is_final };
            match steps.iter_mut().find(|other| other.next == next) {
                // A call that there is a way back from is the better one of two.
                Some(other) if other.is_final => *other = step,
                Some(_) => {}
                None => steps.push(step),
            }
        }
        tries.returning.append(&mut refused);
        self.steps.push(steps);
        self.tries.push(tries);
    }

    /// The number of a state; a new one if it was not met yet.
    fn enter(&mut self, state: State<P, V, G>) -> usize {
        *self.numbers.entry(encode(&state)).or_insert_with(|| {
            self.states.push(state);
            self.states.len() - 1
        })
    }

    /// The number of a state of this world.
    ///
    /// # Panics
    /// If no calls lead there.
    pub fn number(&self, state: &State<P, V, G>) -> usize {
        self.numbers[&encode(state)]
    }
}

/// A search for ways to what becomes less all the time: where nothing was found it does not look again.
#[derive(Debug)]
pub struct Search {
    /// Also by calls that there is no way back from.
    finals: bool,
    /// States that no way leads from.
    closed: Vec<bool>,
    /// How the search came to a state; nothing between searches.
    origins: Vec<Option<(usize, Call)>>,
}

impl Search {
    /// One that has not begun.
    pub fn new<const P: usize, const V: usize, const G: usize>(graph: &Graph<P, V, G>, finals: bool) -> Self {
        let states = graph.states.len();
        Self { finals, closed: vec![false; states], origins: vec![None; states] }
    }

    /// The fewest calls that lead to a state that is looked for.
    pub fn way<const P: usize, const V: usize, const G: usize>(
        &mut self,
        graph: &Graph<P, V, G>,
        from: usize,
        is_there: impl Fn(usize) -> bool,
    ) -> Option<Vec<Call>> {
        if is_there(from) {
            return Some(Vec::new());
        }
        let mut met = vec![from];
        let found = self.spread(graph, &mut met, is_there);
        let way = found.map(|state| self.back(state));
        for state in met {
            self.origins[state] = None;
            self.closed[state] |= way.is_none();
        }
        way
    }

    /// Goes from the first state met to all that can be reached, until it meets one that is looked for.
    fn spread<const P: usize, const V: usize, const G: usize>(
        &mut self,
        graph: &Graph<P, V, G>,
        met: &mut Vec<usize>,
        is_there: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let first = met[0];
        let mut visited = 0;
        while let Some(state) = met.get(visited).copied() {
            visited += 1;
            for Step { call, next, is_final } in graph.steps[state].iter().copied() {
                let is_met = next == first || self.origins[next].is_some();
                if is_met || self.closed[next] || is_final && !self.finals {
                    continue;
                }
                self.origins[next] = Some((state, call));
                met.push(next);
                if is_there(next) {
                    return Some(next);
                }
            }
        }
        None
    }

    /// The calls to a state from the first one.
    fn back(&self, mut state: usize) -> Vec<Call> {
        let mut way = Vec::new();
        while let Some((before, call)) = self.origins[state] {
            way.push(call);
            state = before;
        }
        way.reverse();
        way
    }
}

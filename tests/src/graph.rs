//! All states of a small world and the calls that lead from one to another, by the specification alone.
//!
//! States are numbers here, so that a way through the world is found without asking the rules again.

use spec::explore::{MAX_HOLDS, encode};
use spec::{Call, State, World, step};
use std::collections::{HashMap, VecDeque};

/// A call that leads to another state.
#[derive(Clone, Copy, Debug)]
struct Step {
    call: Call,
    next: usize,
}

/// Every state that calls lead to from a first one, which is state 0.
#[derive(Debug)]
pub struct Graph<const P: usize, const V: usize, const G: usize> {
    states: Vec<State<P, V, G>>,
    numbers: HashMap<u128, usize>,
    /// From each state, one step to each other that a single call leads to.
    steps: Vec<Vec<Step>>,
    /// What is to be tried in each state: last what is refused, before it what there is a way back from, first the
    /// rest.
    pub tries: Vec<Vec<Call>>,
}

/// Whether there is no way back from a call that succeeds.
pub fn is_final(call: Call) -> bool {
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
        let mut tries = Vec::new();
        for call in calls.iter().copied() {
            if matches!(call, Call::Pin { pfn } if state.pages[pfn as usize].pins >= MAX_HOLDS) {
                continue;
            }
            let (outcome, next) = step(world, state, call, None);
            tries.push((outcome.is_refusal(), !is_final(call), call));
            let next = self.enter(next);
            match steps.iter_mut().find(|step| step.next == next) {
                // A call that there is a way back from is the better one of two.
                Some(step) if is_final(step.call) => step.call = call,
                Some(_) => {}
                None => steps.push(Step { call, next }),
            }
        }
        tries.sort_by_key(|(refused, returns, _)| (*refused, *returns));
        self.steps.push(steps);
        self.tries.push(tries.into_iter().map(|(.., call)| call).collect());
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

    /// The fewest calls that lead to a state that is looked for; with none that there is no way back from, unless
    /// `finals`. States from which there is no way are noted in `closed`, and not entered again: what is looked for must
    /// only become less as long as it is used.
    pub fn way(
        &self,
        from: usize,
        finals: bool,
        closed: &mut [bool],
        is_there: impl Fn(usize) -> bool,
    ) -> Option<Vec<Call>> {
        if is_there(from) {
            return Some(Vec::new());
        }
        let mut origins = HashMap::new();
        let mut queue = VecDeque::from([from]);
        while let Some(state) = queue.pop_front() {
            for Step { call, next } in self.steps[state].iter().copied() {
                if closed[next] || next == from || is_final(call) && !finals || origins.contains_key(&next) {
                    continue;
                }
                origins.insert(next, (state, call));
                if is_there(next) {
                    return Some(back(&origins, next));
                }
                queue.push_back(next);
            }
        }
        origins.keys().chain([&from]).for_each(|state| closed[*state] = true);
        None
    }
}

/// The calls to a state from the one that has no origin.
fn back(origins: &HashMap<usize, (usize, Call)>, mut state: usize) -> Vec<Call> {
    let mut way = Vec::new();
    while let Some((before, call)) = origins.get(&state) {
        way.push(*call);
        state = *before;
    }
    way.reverse();
    way
}

//! Which locks a thread of a test holds: a lock that is taken out of order fails the test there and then, and
//! whoever writes a table can be asked for its owner's lock.

use super::Lock;
use std::cell::RefCell;

#[cfg(deed_shuttle)]
use shuttle::thread_local;
#[cfg(not(deed_shuttle))]
use std::thread_local;

thread_local! {
    static HELD: RefCell<Vec<Lock>> = const { RefCell::new(Vec::new()) };
}

impl Lock {
    /// Its place in the order.
    const fn rank(self) -> u8 {
        match self {
            Self::Creation => 0,
            Self::Host => 1,
            Self::Hyp => 2,
            Self::Vm(_) => 3,
            #[cfg(feature = "oracle")]
            Self::Oracle => 4,
            Self::Records => 5,
            Self::Cpus => 6,
        }
    }
}

/// A lock that this thread holds, or waits for.
#[derive(Debug)]
pub(super) struct Held(Lock);

impl Held {
    /// Notes that this thread takes a lock.
    ///
    /// # Panics
    /// If it holds one that comes after it, or one of the same kind.
    #[track_caller]
    pub(super) fn note(lock: Lock) -> Self {
        let held = held();
        if let Some(later) = held.iter().find(|held| held.rank() >= lock.rank()) {
            panic!("lock order: {lock:?} is taken by a CPU that holds {later:?}, of {held:?}");
        }
        HELD.with(|held| held.borrow_mut().push(lock));
        Self(lock)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // A thread that ends has nothing to note any more.
        let _ = HELD.try_with(|held| held.borrow_mut().retain(|lock| *lock != self.0));
    }
}

/// The locks that this thread holds, in the order in which it took them.
pub fn held() -> Vec<Lock> {
    HELD.with(|held| held.borrow().clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Mutex;

    #[test]
    fn locks_taken_in_order_are_held_until_they_are_dropped() {
        let locks = [Lock::Creation, Lock::Host, Lock::Hyp, Lock::Vm(7), Lock::Records];
        let mutexes = locks.map(|lock| Mutex::new(lock, ()));
        let mut guards: Vec<_> = mutexes.iter().map(Mutex::lock).collect();
        assert_eq!(held(), locks);
        guards.remove(2);
        assert_eq!(held(), [Lock::Creation, Lock::Host, Lock::Vm(7), Lock::Records]);
        drop(guards);
        assert_eq!(held(), []);
    }

    #[test]
    #[should_panic(expected = "lock order: Host is taken by a CPU that holds Vm(3), of [Vm(3)]")]
    fn a_lock_taken_out_of_order_is_noticed() {
        let (host, vm) = (Mutex::new(Lock::Host, ()), Mutex::new(Lock::Vm(3), ()));
        let _vm = vm.lock();
        let _host = host.lock();
    }

    #[test]
    #[should_panic(expected = "lock order: Vm(2) is taken by a CPU that holds Vm(1)")]
    fn two_vms_are_never_locked_together() {
        let vms = [1, 2].map(|slot| Mutex::new(Lock::Vm(slot), ()));
        let _guards = vms.each_ref().map(Mutex::lock);
    }

    #[test]
    fn another_threads_locks_are_not_in_the_way() {
        let (host, vm) = (Mutex::new(Lock::Host, ()), Mutex::new(Lock::Vm(3), ()));
        let _vm = vm.lock();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(host.lock()));
        });
        assert_eq!(held(), [Lock::Vm(3)]);
    }
}

//! Threads, as whoever runs an operator has them.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads that run tasks.
pub trait Pool {
    /// Runs `task` for `0..count`, in any order, side by side; returns when all are done.
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync));

    /// How many run at a time, for dividing the work.
    fn threads(&self) -> usize;
}

/// Runs `task` for `0..count`; a thread that is done with one takes the next, so that a thread which others disturb does fewer.
pub(crate) fn take_turns(pool: &dyn Pool, count: usize, task: &(dyn Fn(usize) + Sync)) {
    let next = AtomicUsize::new(0);
    pool.run(pool.threads().clamp(1, count.max(1)), &|_| {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return;
            }
            task(at);
        }
    });
}

//! Where time goes: the spans that ops, blocks, steps and stages open on the thread that calls them.
//!
//! An op spreads its work over threads inside and returns when it is done, so the wall time of the calling thread is
//! all there is: the own times of all spans sum to the outermost span's by construction. On a GPU a call returns
//! before its work ran, and spans then time the calls.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Context;

/// What an op has to do, whatever the way it is done: what its time is set beside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Additions and multiplications of products; 0 where memory is all that counts.
    pub flops: u64,
    /// Bytes of operands read and of results written.
    pub bytes: u64,
}

/// Sums up the spans of the contexts that it is attached to, one entry for each different stack.
///
/// One call at a time: spans of two threads would count as nested.
#[derive(Debug, Default)]
pub struct Recorder {
    tree: Mutex<Tree>,
}

/// All spans of one stack.
#[derive(Debug, Clone)]
pub struct Total {
    /// From the outermost span to this one: `["stage_c", "step", "attn_block.2", "linear"]`.
    pub stack: Vec<String>,
    /// The innermost span's name, without its number.
    pub name: &'static str,
    /// Whether it is an op, which has work of its own to do.
    pub is_op: bool,
    /// How often it was opened.
    pub calls: u64,
    /// Wall time between opening and closing.
    pub time: Duration,
    /// [`Total::time`] less that of the spans within.
    pub own: Duration,
    /// What was noted by [`Span::working`], summed up.
    pub work: Work,
}

/// Open until it is dropped. Without a recorder it is empty, and nothing looks at a clock.
#[derive(Debug)]
#[must_use = "a span ends where it is dropped"]
pub struct Span<'a>(Option<Open<'a>>);

#[derive(Debug)]
struct Open<'a> {
    recorder: &'a Recorder,
    node: usize,
    work: Work,
    started: Instant,
}

/// The name of a span: what it is, and which of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Name {
    what: &'static str,
    number: Option<usize>,
    is_op: bool,
}

#[derive(Debug)]
struct Node {
    name: Name,
    parent: usize,
    children: Vec<usize>,
    calls: u64,
    time: Duration,
    work: Work,
}

/// The stacks that were seen. Node 0 stands for what lies outside of all spans.
#[derive(Debug)]
struct Tree {
    nodes: Vec<Node>,
    current: usize,
}

impl Context {
    /// The same context, whose spans `recorder` hears of.
    #[must_use]
    pub fn recorded_by(mut self, recorder: &Arc<Recorder>) -> Self {
        self.recorder = Some(recorder.clone());
        self
    }

    /// The span of an op, from its head to its end: `let _span = cx.op("linear");`.
    #[inline]
    pub fn op(&self, what: &'static str) -> Span<'_> {
        self.open(Name { what, number: None, is_op: true })
    }

    /// The span of something made of ops.
    #[inline]
    pub fn span(&self, what: &'static str) -> Span<'_> {
        self.open(Name { what, number: None, is_op: false })
    }

    /// As [`Context::span`], for number `number` of several.
    #[inline]
    pub fn span_of(&self, what: &'static str, number: usize) -> Span<'_> {
        self.open(Name { what, number: Some(number), is_op: false })
    }

    #[inline]
    fn open(&self, name: Name) -> Span<'_> {
        Span(self.recorder.as_ref().map(|recorder| recorder.open(name)))
    }
}

impl Span<'_> {
    /// Notes what there is to do. `work` is only called if somebody records.
    #[inline]
    pub fn working(mut self, work: impl FnOnce() -> Work) -> Self {
        if let Some(open) = &mut self.0 {
            open.work = work();
        }
        self
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let time = self.started.elapsed();
        self.recorder.lock().leave(self.node, time, self.work);
    }
}

impl Recorder {
    /// One that has heard nothing.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// All stacks so far, each before those that lie within it, in the order in which they were first seen. Spans that
    /// are still open count with the calls that have ended.
    pub fn totals(&self) -> Vec<Total> {
        self.lock().totals()
    }

    #[cold]
    fn open(&self, name: Name) -> Open<'_> {
        let node = self.lock().enter(name);
        Open { recorder: self, node, work: Work::default(), started: Instant::now() }
    }

    fn lock(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Tree {
    fn default() -> Self {
        Tree { nodes: vec![Node::new(Name { what: "", number: None, is_op: false }, 0)], current: 0 }
    }
}

impl Node {
    fn new(name: Name, parent: usize) -> Self {
        Node { name, parent, children: Vec::new(), calls: 0, time: Duration::ZERO, work: Work::default() }
    }
}

impl Tree {
    fn enter(&mut self, name: Name) -> usize {
        let seen = self.nodes[self.current].children.iter().find(|&&child| self.nodes[child].name == name);
        let node = match seen {
            Some(&child) => child,
            None => {
                let child = self.nodes.len();
                self.nodes.push(Node::new(name, self.current));
                self.nodes[self.current].children.push(child);
                child
            }
        };
        self.current = node;
        node
    }

    fn leave(&mut self, node: usize, time: Duration, work: Work) {
        let left = &mut self.nodes[node];
        left.calls += 1;
        left.time += time;
        left.work.flops += work.flops;
        left.work.bytes += work.bytes;
        self.current = left.parent;
    }

    fn totals(&self) -> Vec<Total> {
        let mut totals = Vec::new();
        self.add_totals(0, &[], &mut totals);
        totals
    }

    fn add_totals(&self, node: usize, outer: &[String], totals: &mut Vec<Total>) {
        for child in &self.nodes[node].children {
            let Node { name, children, calls, time, work, .. } = &self.nodes[*child];
            let shown = match name.number {
                // No space: folded stacks have one before the count alone.
                Some(number) => format!("{}.{number}", name.what),
                None => name.what.to_owned(),
            };
            let stack = [outer, &[shown]].concat();
            let within: Duration = children.iter().map(|&inner| self.nodes[inner].time).sum();
            totals.push(Total {
                stack: stack.clone(),
                name: name.what,
                is_op: name.is_op,
                calls: *calls,
                time: *time,
                own: time.saturating_sub(within),
                work: *work,
            });
            self.add_totals(*child, &stack, totals);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn cx() -> Context {
        Context::new(&Device::cpu(1).unwrap())
    }

    fn name(what: &'static str) -> Name {
        Name { what, number: None, is_op: false }
    }

    #[test]
    fn own_times_are_what_inner_spans_leave() {
        // step 100 ns: block 30 (op 12), block 50 (op 20, another 25); then a second step of 7 with nothing in it.
        let mut tree = Tree::default();
        let ns = Duration::from_nanos;
        let work = |flops| Work { flops, bytes: 2 * flops };
        let step = tree.enter(name("step"));
        for (block_time, ops) in [(30, &[("linear", 12)][..]), (50, &[("linear", 20), ("add", 25)])] {
            let block = tree.enter(name("block"));
            for &(what, time) in ops {
                let op = tree.enter(name(what));
                tree.leave(op, ns(time), work(time));
            }
            tree.leave(block, ns(block_time), Work::default());
        }
        tree.leave(step, ns(100), Work::default());
        let again = tree.enter(name("step"));
        tree.leave(again, ns(7), Work::default());
        assert_eq!(again, step);

        let totals = tree.totals();
        let seen: Vec<_> = totals
            .iter()
            .map(|t| (t.stack.join(";"), t.calls, t.time.as_nanos(), t.own.as_nanos()))
            .collect();
        let expected = [
            ("step", 2, 107, 27),
            ("step;block", 2, 80, 23),
            ("step;block;linear", 2, 32, 32),
            ("step;block;add", 1, 25, 25),
        ];
        assert_eq!(seen, expected.map(|(stack, calls, time, own)| (stack.to_owned(), calls, time, own)));
        assert_eq!(totals[2].work, work(32));
    }

    #[test]
    fn spans_nest_and_own_times_sum_to_the_whole() {
        let recorder = Recorder::new();
        let cx = cx().recorded_by(&recorder);
        for number in [0, 1, 0] {
            let _stage = cx.span("stage");
            // A context made of it is heard too.
            let cx = cx.clone().attached(None);
            let _block = cx.span_of("block", number);
            drop(cx.op("linear").working(|| Work { flops: 5, bytes: 1 }));
            let _norm = cx.op("norm");
            drop(cx.op("linear"));
        }
        let totals = recorder.totals();
        let stacks: Vec<String> = totals.iter().map(|t| t.stack.join(";")).collect();
        let below = |block: &str| {
            ["", ";linear", ";norm", ";norm;linear"].map(|rest| format!("stage;{block}{rest}")).to_vec()
        };
        assert_eq!(stacks, [vec!["stage".to_owned()], below("block.0"), below("block.1")].concat());
        assert_eq!(totals.iter().map(|t| t.calls).collect::<Vec<_>>(), [3, 2, 2, 2, 2, 1, 1, 1, 1]);
        assert_eq!(totals.iter().map(|t| t.work.flops).collect::<Vec<_>>(), [0, 0, 10, 0, 0, 0, 5, 0, 0]);
        let ops = ["linear", "norm"];
        assert!(totals.iter().all(|t| t.is_op == ops.contains(&t.name)));
        // No span takes longer than the one around it: otherwise own times would sum to more.
        assert_eq!(totals.iter().map(|t| t.own).sum::<Duration>(), totals[0].time);
    }

    #[test]
    fn nothing_is_recorded_without_a_recorder() {
        let cx = cx();
        let span = cx.op("linear").working(|| panic!("nobody asked"));
        assert!(span.0.is_none());
        // One that is heard leaves nothing behind in a context that is not.
        let recorder = Recorder::new();
        drop(cx.clone().recorded_by(&recorder).span("heard"));
        assert!(cx.span_of("block", 1).0.is_none());
        assert_eq!(recorder.totals().len(), 1);
    }
}

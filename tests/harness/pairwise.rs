//! Pairwise tables: every pair of levels of any two factors, in few rows.

use std::collections::HashSet;

type Pair = (usize, usize, usize, usize);

/// Rows (one level per factor) that together hold every pair of levels which some allowed row holds.
///
/// Greedy over the full product, so meant for products of a few thousand rows. The same input gives the same
/// table.
pub fn table(levels: &[usize], allowed: impl Fn(&[usize]) -> bool) -> Vec<Vec<usize>> {
    let candidates: Vec<_> = product(levels).into_iter().filter(|row| allowed(row)).collect();
    let mut open: HashSet<Pair> = candidates.iter().flat_map(|row| pairs(row)).collect();
    let mut rows = Vec::new();
    while !open.is_empty() {
        let gain = |row: &Vec<usize>| pairs(row).filter(|pair| open.contains(pair)).count();
        // Of equals the first: `max_by_key` alone would take the last, and heavy levels stand last.
        let Some(best) = candidates.iter().rev().max_by_key(|row| gain(row)) else { break };
        pairs(best).for_each(|pair| {
            open.remove(&pair);
        });
        rows.push(best.clone());
    }
    rows
}

fn product(levels: &[usize]) -> Vec<Vec<usize>> {
    levels.iter().fold(vec![Vec::new()], |rows, &count| {
        rows.iter()
            .flat_map(|row| (0..count).map(|level| row.iter().copied().chain([level]).collect()))
            .collect()
    })
}

fn pairs(row: &[usize]) -> impl Iterator<Item = Pair> {
    (0..row.len()).flat_map(move |a| (a + 1..row.len()).map(move |b| (a, row[a], b, row[b])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_that_can_be_is_in_the_table() {
        let levels = [2, 2, 2, 7, 6, 4];
        let allowed = |row: &[usize]| row[3] + row[4] < 9;
        let rows = table(&levels, allowed);
        let covered: HashSet<_> = rows.iter().flat_map(|row| pairs(row)).collect();
        let possible: HashSet<_> =
            product(&levels).iter().filter(|row| allowed(row)).flat_map(|row| pairs(row)).collect();
        assert_eq!(covered, possible);
        assert!(rows.iter().all(|row| allowed(row)));
        assert!(rows.len() < 60, "{} rows are no saving", rows.len());
    }

    #[test]
    fn two_factors_need_their_whole_product() {
        assert_eq!(table(&[3, 4], |_| true).len(), 12);
    }
}

-- One row per commit: its repositories, and their licenses in the same order, joined by commas.
WITH pairs AS (  -- a commit may come from several exports that name the same repository
  SELECT base.commit, base.repo_name, MIN(base.license) AS license
  FROM commits_table_base AS base
  GROUP BY base.commit, base.repo_name
)
SELECT
  pairs.commit,
  STRING_AGG(pairs.repo_name, ',' ORDER BY pairs.repo_name) AS repos,
  STRING_AGG(pairs.license, ',' ORDER BY pairs.repo_name) AS licenses
FROM pairs
GROUP BY pairs.commit
